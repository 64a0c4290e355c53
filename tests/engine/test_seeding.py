import torch

from d3etr.engine.seeding import derive_seed, seed_generators


def test_equal_parts_give_equal_seeds_and_others_do_not() -> None:
    assert derive_seed(1, "step", 2) == derive_seed(1, "step", 2)
    assert len({derive_seed(a, b) for a in range(30) for b in range(30)}) == 900
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_seeded_generators_repeat_their_numbers() -> None:
    device = torch.device("cpu")
    seed_generators(derive_seed(3, "x"), device)
    first = torch.rand(4)
    seed_generators(derive_seed(3, "x"), device)
    assert torch.equal(first, torch.rand(4))
