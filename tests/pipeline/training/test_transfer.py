"""Every tensor gets exactly one class, and the child starts as near to its parent as its form allows."""

import pytest
import torch
from mini import mini_codec, mini_stage
from torch import Tensor

from modules import HPCM, preset_config
from modules.loading import state_digest
from pipeline.recipes.loading import load_recipe
from pipeline.recipes.schema import Transfer
from pipeline.training.narrowing import fit
from pipeline.training.objectives import Handover
from pipeline.training.transfer import TransferError, new_components, transfer_weights


def pair(phase: int) -> tuple[HPCM, HPCM, Transfer]:
    """Parent, child and the mini recipe's rules for reaching a phase."""
    return mini_codec(phase - 1).eval(), mini_codec(phase).eval(), mini_stage(f"phase{phase}").transfer


@pytest.mark.parametrize("phase", range(1, 5))
def test_every_tensor_is_in_one_class(phase: int) -> None:
    parent, child, rules = pair(phase)
    before = {name: tensor.clone() for name, tensor in child.state_dict().items()}
    ledger = transfer_weights(parent, child, rules)
    ours = {entry.name for entry in ledger.entries if entry.kind != "dropped"}
    used = {entry.source for entry in ledger.entries if entry.source}
    tables = set(child.coding_table_names())
    assert ours == child.state_dict().keys() - tables
    assert used == parent.state_dict().keys() - tables
    assert len(ledger.entries) == sum(ledger.counts().values())
    for entry in ledger.entries:
        if entry.kind in ("copied", "renamed"):
            assert torch.equal(child.state_dict()[entry.name], parent.state_dict()[entry.source])
        elif entry.kind == "initialized" and "gamma" not in entry.name and "input_proj" not in entry.name:
            assert torch.equal(child.state_dict()[entry.name], before[entry.name])
    components = tuple(f"{component}." for component in new_components(parent, child))
    assert ledger.new == {name for name in ours if name.startswith(components)}


@torch.no_grad()
def test_phase3_starts_where_phase2_ended(picture: Tensor) -> None:
    parent, child, rules = pair(3)
    transfer_weights(parent, child, rules)
    expected, actual = parent(picture), child(picture)
    torch.testing.assert_close(actual["x_hat"], expected["x_hat"])
    torch.testing.assert_close(actual["likelihoods"]["y"], expected["likelihoods"]["y"])


@torch.no_grad()
def test_phases_start_exactly_where_phi_context_ended(picture: Tensor) -> None:
    sizes = mini_stage("baseline").model.overrides
    parent, child = (HPCM(preset_config("phi-context", phase, **sizes)).eval() for phase in (0, 2))
    transfer_weights(parent, child, Transfer(fit=True))
    assert fit(parent, child, [picture]) == []
    expected, actual = (model(picture) for model in (parent, child))
    for name in ("y_hat", "scales"):
        assert torch.equal(expected[name], actual[name])


@torch.no_grad()
def test_the_designs_own_initialization_does_not(picture: Tensor) -> None:
    parent, child, _ = pair(3)
    transfer_weights(parent, child, Transfer(initialization="design"))
    assert not torch.allclose(child(picture)["likelihoods"]["y"], parent(picture)["likelihoods"]["y"], atol=1e-3)


def test_from_scratch_nothing_is_copied() -> None:
    parent, child, rules = pair(3)
    before = state_digest(child.state_dict())
    ledger = transfer_weights(parent, child, rules.model_copy(update={"initialization": "scratch"}))
    assert state_digest(child.state_dict()) == before
    assert ledger.counts().keys() == {"initialized", "dropped"}
    assert ledger.new == child.state_dict().keys() - set(child.coding_table_names())


@pytest.mark.parametrize("phase", range(1, 5))
@pytest.mark.parametrize("initialization", ["design", "function-preserving"])
@torch.no_grad()
def test_a_handover_starts_exactly_at_the_parent(phase: int, initialization: str, picture: Tensor) -> None:
    parent, child, _ = pair(phase)
    transfer_weights(parent, child, Transfer(initialization=initialization))
    expected = parent(picture)
    handover = Handover(child, parent, new_components(parent, child))
    started = child(picture)
    assert torch.equal(started["x_hat"], expected["x_hat"])
    assert torch.equal(started["likelihoods"]["y"], expected["likelihoods"]["y"])
    handover.share.fill_(1.0)
    ended = child(picture)
    handover.end()
    assert torch.equal(ended["likelihoods"]["y"], child(picture)["likelihoods"]["y"])


def test_large_priors_hand_their_last_1x1_on() -> None:
    sizes = {"M": 16, "N": 8, "widths": (8, 8, 8), "attention": {"cross-attention": {"heads": 4}}}
    parent, child = (HPCM(preset_config("large", phase, **sizes)) for phase in (3, 4))
    transfer_weights(parent, child, load_recipe("large").stages["phase4"].transfer)
    for prior in ("y_spatial_prior_s1_s2", "y_spatial_prior_s3"):
        theirs, ours = (model.get_submodule(prior).branch_2[-1].weight for model in (parent, child))
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            {"attn_s4.conv_out": "attn_s3.output_proj"},
            r"\['attn_s4.conv_out'\]: matches no tensor of the parent; did you mean 'attn_s.\.conv_out'",
        ),
        ({"attn_s3.conv_out": "attn_s3.out"}, r"to attn_s3.out.\w+, which the child does not have"),
        ({"attn_s3.conv_out": "h_s.branch.0"}, r"h_s.branch.0.\w+ has shape \[.*\] in the child but"),
        (
            {"attn_s3.conv_out": "attn_s3.output_proj", "attn_s1.conv_out": "attn_s3.output_proj"},
            r"both attn_s3.conv_out.\w+ and attn_s1.conv_out.\w+ become attn_s3.output_proj",
        ),
    ],
)
def test_rules_that_fit_nowhere_are_named(rename: dict[str, str], message: str) -> None:
    parent, child, _ = pair(1)
    with pytest.raises(TransferError, match=message):
        transfer_weights(parent, child, Transfer(rename=rename))


def test_other_sizes_are_named() -> None:
    with pytest.raises(TransferError, match="they must agree; change"):
        transfer_weights(mini_codec(0), HPCM(preset_config("tiny", 1)), Transfer())


def test_the_digest_covers_values_names_and_shapes_but_not_their_order() -> None:
    one, other = torch.randn(4), torch.randn(4)
    digest = state_digest({"a": one, "b": other})
    assert state_digest({"b": other, "a": one}) == digest
    changed = {"a": one + 1, "b": other}, {"a": one.view(2, 2), "b": other}, {"ab": one, "b": other}
    assert digest not in map(state_digest, changed)
