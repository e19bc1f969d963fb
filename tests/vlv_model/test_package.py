import subprocess
import sys

import pytest

import vlv_model


def test_settings_and_errors_come_without_the_heavy_libraries():
    program = (
        "import sys, vlv_model; vlv_model.ModelConfig, vlv_model.ModelError; "
        "assert not {'torch', 'transformers', 'diffusers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_name_that_is_promised_is_there():
    for name in vlv_model.__all__:
        assert getattr(vlv_model, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'VLVDecoder'"):
        _ = vlv_model.VLVDecoder
