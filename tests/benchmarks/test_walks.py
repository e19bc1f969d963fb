"""The walk of a call through files: which it enters, and where it turns back."""

import sys
from pathlib import Path

import pytest

from benchmarks.scale.walks import Walk


def test_a_walk_has_its_files_in_order_and_each_turn_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first_room.py").write_text(
        "def start():\n    import second_room\n    return [second_room.work(n) for n in range(3)]\n\n"
        "def helper(n):\n    return n + 1\n"
    )
    (tmp_path / "second_room.py").write_text(
        "import json\nfrom first_room import helper\n\n"
        "def work(n):\n    return json.loads(json.dumps(again(helper(n))))\n\n"
        "def again(n):\n    return n\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from first_room import start

    with Walk((str(tmp_path),)) as walk:
        assert start() == [1, 2, 3]
    first, second = str(tmp_path / "first_room.py"), str(tmp_path / "second_room.py")
    assert walk.files == [first, second]  # and none of json
    assert walk.turns() == [(second, first)]
    assert sys.getprofile() is None
