"""Tags of MLflow's runs are read as they were written, or refused with an error that names them."""

import pytest

from pipeline.tracking.tags import ChainTags, StageTags, TagError


def test_tags_read_back_as_they_were_written() -> None:
    chain = ChainTags("mini", 0.0130000001, 3)
    stage = StageTags(
        "phase1", "k", {"training images": "d"}, "3 copied", 0.25, "accepted", "a/b", "c", {7: "started", 12: "resumed"}
    )
    tags = {**chain.to_tags(), **stage.to_tags(), "mlflow.user": "x"}
    assert ChainTags.from_tags(tags, "run") == chain
    assert StageTags.from_tags(tags, "run") == stage
    assert tags["hpcm.attempt.7"] == "1970-01-01 00:00:00 UTC: started"


def test_what_is_not_known_yet_is_not_written() -> None:
    assert StageTags(ledger="3 copied").to_tags() == {"hpcm.ledger": "3 copied"}


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"hpcm.recipe": "mini", "hpcm.lmbda": "much"}, "run 12ab: the tag hpcm.lmbda is 'much'"),
        ({"hpcm.lmbda": "0.1"}, "run 12ab: the tag hpcm.recipe is missing"),
    ],
)
def test_tags_of_another_program_are_refused_by_name(tags: dict[str, str], message: str) -> None:
    with pytest.raises(TagError, match=message):
        ChainTags.from_tags(tags, "12ab")
