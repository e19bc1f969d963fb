"""Seeds keep their values: scenes, noise and sampled captions of earlier versions depend on them."""

from pipelines.tiny_world.dataset import drawing_seed
from vlv_model.seeds import mix, mix_bytes


def test_seeds_keep_their_values() -> None:
    assert mix(42, 1, 7) == 17492349772876235208
    assert mix(0, 0, -5) == 17483711563109100004
    assert mix_bytes(0, -5, 2) == 12445119541474095030
    assert mix_bytes(3, 7) == 175345345533142405
    assert drawing_seed(0, "validation", 3) == 7216072773778891929


def test_mixed_seeds_differ() -> None:
    given = [(s, e, k) for s in range(5) for e in range(-1, 5) for k in range(-5, 5)]
    for hashed in (mix, mix_bytes):
        assert len({hashed(*values) for values in given}) == len(given)
