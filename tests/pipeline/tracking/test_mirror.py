"""MLflow as a mirror of folders: complete, repeatable, and the same in every store."""

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mini import Hpcm
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow_server import Server
from pages import measured, shown, training, twice_at_once

from pipeline.common.files import write_json
from pipeline.records import metrics
from pipeline.records.chains import CHAIN_FILE, ChainFacts, read_chain
from pipeline.records.metrics import MetricsLog, read_history
from pipeline.records.record import StageRecord
from pipeline.tracking.mirror import Mirror, differences
from pipeline.tracking.registry import register
from pipeline.tracking.store import Store, StoreError, experiment_id, find_run

MODEL, CHAIN = "hpcm-mini-lmbda-0.013", "mini λ=0.013"
WRITING = [
    *((MlflowClient, name) for name in (
        "create_run", "log_batch", "log_inputs", "log_outputs", "set_terminated", "create_logged_model",
        "finalize_logged_model", "create_registered_model", "create_model_version", "set_registered_model_alias",
    )),
    *((LocalArtifactRepository, name) for name in ("log_artifact", "log_artifacts")),
]  # fmt: skip
"""All calls by which a mirror changes a store."""


def test_mlflow_shows_what_the_folders_say(chain: Path, store: Store) -> None:
    found, record = shown(store), StageRecord.read(chain / "phase1")
    assert sorted(found) == [MODEL, "logged models", "mini baseline", "mini phase1", CHAIN]
    run = found["mini phase1"]
    assert (run["status"], run["times"]) == ("FINISHED", (record.began, record.ended))
    assert run["parameters"]["schedule.frozen.handover"] == "4"
    assert run["parameters"]["codec.attn_s3.kind"] == "rwkv"
    tags = run["tags"]
    assert tags["mlflow.parentRunId"] == CHAIN
    assert tags["hpcm.checkpoint"] == "mini/lmbda-0.013/phase1/checkpoint.safetensors"
    assert tags["hpcm.acceptance"].startswith("accepted")
    assert tags["hpcm.device"] == "cpu"
    assert {"mlflow.source.name", "mlflow.user", "hpcm.version.torch", "hpcm.ledger"} <= tags.keys()
    note = tags["mlflow.note.content"]
    assert "Replaces `attn_s3` (cross-attention to rwkv)." in note
    assert "Relative to the parent: " in note
    logged = {key: [(step, float(value)) for step, _, value in values] for key, values in run["metrics"].items()}
    system = {"system/cpu_utilization_percentage": [(0, 50.0), (1, 51.0)]}
    assert logged == {key: sorted(values) for key, values in read_history(chain / "phase1").items()} | system
    assert {*record.files, "record.json", "images.json"} <= set(run["artifacts"])
    pictures = [path for path in run["artifacts"] if path.startswith("images/coded~")]
    assert [Path(path).suffix for path in pictures] == [".webp", ".png"]
    assert run["data"] == sorted((i.name, i.digest[:36]) for i in (record.train_images, record.val_images))
    assert found[CHAIN]["artifacts"] == ["stages.json"]
    assert [float(value) for *_, value in found[CHAIN]["metrics"]["phase1/bpp"]] == [record.quality.bpp]
    assert f"| phase1 | {record.quality.bpp:.4f} |" in found[CHAIN]["tags"]["mlflow.note.content"]


def test_a_stage_that_moves_while_it_is_mirrored_is_sent_by_the_next_mirror(
    copied: tuple[Path, Store], fresh: Store, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mirror = copied[0], Mirror(fresh)

    def moved_first(*arguments: Any) -> None:
        if arguments[3].record.name == "phase1":
            shutil.move(folder / "phase1", folder.parent / "moved")
        register(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.tracking.mirror.register", moved_first)
        mirror.chain(folder, working=True)
    shutil.move(folder.parent / "moved", folder / "phase1")
    mirror.chain(folder, working=False)
    assert shown(fresh) == shown(store)


def test_a_repeated_mirror_changes_nothing(copied: tuple[Path, Store], store: Store) -> None:
    Mirror(copied[1]).chain(copied[0], working=False)
    assert shown(copied[1]) == shown(store)


def test_a_server_gets_the_same_and_keeps_it(chain: Path, store: Store, server: Server) -> None:
    other = Store(server.uri)
    for _ in range(2):
        Mirror(other).chain(chain, working=False)
        assert shown(other) == shown(store)
    assert differences(other, read_chain(chain), read_chain(chain).published["phase1"]) == []
    assert repeated(other) == 1


def test_mirrors_that_are_killed_between_any_two_calls_leave_nothing_twice(
    chain: Path, store: Store, fresh: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: set[str] = set()

    def then_killed(call: Callable[..., Any]) -> Callable[..., Any]:
        def killed(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            if call.__name__ == "log_artifacts":  # An upload that is not confirmed is repeated.
                if arguments[0].artifact_dir in uploaded:
                    return result
                uploaded.add(arguments[0].artifact_dir)
            raise KeyboardInterrupt

        return killed

    for kind, name in WRITING:
        monkeypatch.setattr(kind, name, then_killed(getattr(kind, name)))
    kills, ended = 0, False
    while not ended:
        with suppress(KeyboardInterrupt):  # after its first call that writes
            Mirror(fresh).chain(chain, working=False)
            ended = True
        kills += not ended
    monkeypatch.undo()
    assert kills > 30
    assert shown(fresh) == shown(store)


def test_two_mirrors_at_once_make_no_run_twice(chain: Path, store: Store, fresh: Store) -> None:
    def bring() -> None:
        Mirror(fresh).chain(chain, working=False)

    twice_at_once(bring)
    assert shown(fresh) == shown(store)


def test_what_a_store_accepts_and_loses_is_sent_by_the_next_mirror(
    chain: Path, store: Store, fresh: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *arguments, **options: None)
        patch.setattr(LocalArtifactRepository, "log_artifact", lambda *arguments, **options: None)
        Mirror(fresh).chain(chain, working=False)
    Mirror(fresh).chain(chain, working=False)
    assert shown(fresh) == shown(store)


def test_a_store_ignores_a_metric_that_it_has(fresh: Store) -> None:
    assert repeated(fresh) == 1


def repeated(store: Store) -> int:
    """How often a store keeps metrics that are sent three times."""
    client = store.client()
    run = client.create_run(experiment_id(client)).info.run_id
    values = {"loss": 0.5, "nan": float("nan"), "high": float("inf"), "low": float("-inf")}
    for _ in range(3):
        client.log_batch(run, metrics=[Metric(key, value, 1000, 7) for key, value in values.items()])
    return max(len(client.get_metric_history(run, key)) for key in values)


def test_only_lines_that_no_resume_cuts_are_sent(chain: Path, tmp_path: Path, fresh: Store) -> None:
    folder, mirror = tmp_path / "runs" / "mini" / chain.name, Mirror(fresh)
    for lines in (3, 5):  # The same mirror sends what became settled since its last call.
        working = training(chain, folder, lines)
        mirror.chain(folder, working=True)
        run = shown(fresh)["mini phase1"]
        sent = sum(len(values) for key, values in run["metrics"].items() if not key.startswith("system/"))
        assert sent == sum(len(r.values) for r in metrics.read_reports(working / metrics.FILE, 0, lines))
        assert (run["status"], run["artifacts"]) == ("RUNNING", ["ledger.json"])
    Mirror(fresh).chain(folder, working=False)
    run = shown(fresh)["mini phase1"]
    assert run["status"] == "KILLED"
    assert run["times"][1] == max(report.time for report in metrics.read_reports(working / metrics.FILE))


def test_values_that_stores_change_are_sent_once(chain: Path, tmp_path: Path, fresh: Store) -> None:
    folder = tmp_path / "runs" / "mini" / chain.name
    working = training(chain, folder, 0)
    record = StageRecord.read(working)
    source = replace(record.attempts[0].source, command=f"hpcm run \0{9000 * 'x'}")
    replace(record, attempts=(replace(record.attempts[0], source=source),)).write(working)
    log = MetricsLog(working / metrics.SYSTEM)
    log.append({"nan": float("nan"), "high": float("inf"), "low": float("-inf"), "odd\nname": 1.0}, 2)
    Mirror(fresh).chain(folder, working=False)
    before = shown(fresh)
    assert before["mini phase1"]["tags"]["hpcm.command"].startswith("hpcm run ?xxx")
    assert before["mini phase1"]["metrics"]["odd_name"]
    Mirror(fresh).chain(folder, working=False)
    assert shown(fresh) == before
    read = read_chain(folder)
    assert differences(fresh, read, read.stages[0]) == []


def test_a_clock_that_was_set_back_loses_no_values(chain: Path, tmp_path: Path, fresh: Store) -> None:
    folder = tmp_path / "runs" / "mini" / chain.name
    with (training(chain, folder, 0) / metrics.SYSTEM).open("w") as file:
        for step, time, value in ((0, 5, 1.0), (1, 3, 2.0), (2, 5, 1.0)):
            file.write(f'{{"step": {step}, "time": {time}, "values": {{"cpu": {value}}}}}\n')
    Mirror(fresh).chain(folder, working=False)
    assert shown(fresh)["mini phase1"]["metrics"]["cpu"] == [(0, 5, "1.0"), (1, 3, "2.0"), (2, 5, "1.0")]


def test_a_rebuilt_stage_takes_the_place_of_its_predecessor(copied: tuple[Path, Store]) -> None:
    folder, store = copied
    record = StageRecord.read(folder / "phase1")
    (folder / "superseded").mkdir()
    (folder / "phase1").rename(folder / "superseded" / "phase1-0123")
    shutil.copytree(folder / "superseded" / "phase1-0123", folder / "phase1")
    attempts = (replace(record.attempts[0], began=record.began + 10**6, ended=record.began + 2 * 10**6),)
    rebuilt = measured(record, bpp=9.0, rd_loss=900.0)
    replace(rebuilt, key="rebuilt", attempts=attempts).write(folder / "phase1")
    for _ in range(2):
        Mirror(store).chain(folder, working=False)
        client = store.client()
        run_id = find_run(client, read_chain(folder).key)
        assert client.get_run(run_id).data.metrics["phase1/bpp"] == 9.0
        assert [metric.step for metric in client.get_metric_history(run_id, "phase1/bpp")] == [0, 1]
        aliases = {alias: int(n) for alias, n in client.get_registered_model(MODEL).aliases.items()}
        assert aliases == {"baseline": 1, "phase1": 3, "best": 2}
    superseded = find_run(client, record.key)
    assert client.get_run(superseded).data.tags["hpcm.checkpoint"].startswith("mini/lmbda-0.013/superseded/")


def test_differences_between_folder_and_store_are_named(copied: tuple[Path, Store]) -> None:
    folder, store = copied
    read = read_chain(folder)
    stage = read.published["phase1"]
    assert differences(store, read, stage) == []
    client = store.client()
    run_id = find_run(client, stage.record.key)
    client.set_tag(run_id, "hpcm.acceptance", "refused")
    artifacts = Path(store.artifacts(client, run_id).artifact_dir)  # type: ignore[attr-defined]
    (artifacts / "stage.yaml").write_text("name: another\n")
    (artifacts / "ledger.json").unlink()
    path = folder / "phase1" / metrics.FILE
    path.write_text(path.read_text().replace('"train/align/loss": ', '"train/align/loss": 7'))
    MetricsLog(path).append({"train/extra": 1.0}, 99)
    found = differences(store, read, stage)
    assert found[:3] == [
        "tags missing or different: hpcm.acceptance",
        "metrics missing or different: train/extra",
        "artifacts missing or different: ledger.json, metrics.jsonl, stage.yaml",
    ]
    assert found[3:] == ["another value of train/align/loss at step 2"]
    client.delete_run(run_id)
    assert differences(store, read, stage) == ["MLflow has no run of it; `hpcm sync` adds it"]


def test_an_experiment_in_the_trash_is_named_and_filled_once_restored(chain: Path, store: Store, fresh: Store) -> None:
    client = fresh.client()
    experiment = experiment_id(client)
    client.delete_experiment(experiment)
    with pytest.raises(
        StoreError, match=rf"in MLflow's trash: .*mlflow experiments restore --experiment-id {experiment}"
    ):
        Mirror(fresh).chain(chain, working=False)
    client.restore_experiment(experiment)
    Mirror(fresh).chain(chain, working=False)
    assert shown(fresh) == shown(store)


def test_a_stage_that_cannot_be_mirrored_is_named_and_the_others_are_sent(
    copied: tuple[Path, Store], store: Store, hpcm: Hpcm
) -> None:
    folder, emptied = copied
    (folder / "baseline" / "checkpoint.safetensors").write_bytes(b"")
    (folder / "broken").mkdir()
    (folder / "broken" / "record.json").write_text("{")
    (folder.parents[1] / "mlflow.db").unlink()
    printed = hpcm("sync", "--runs", folder.parents[1], code=1)
    assert re.search(r"(?s)broken/record.json: damaged.*baseline/checkpoint.safetensors: ", printed.out + printed.err)
    assert shown(emptied)["mini phase1"] == shown(store)["mini phase1"]


@pytest.mark.parametrize("name", ["../../../secret", "link", "pipe"])
def test_a_strangers_record_sends_nothing_outside_its_folder(
    name: str, copied: tuple[Path, Store], tmp_path: Path, fresh: Store
) -> None:
    folder, _ = copied
    secret = folder.parents[1] / "secret"
    secret.write_text("mine")
    (folder / "phase1" / "link").symlink_to(secret)
    os.mkfifo(folder / "phase1" / "pipe")
    record = StageRecord.read(folder / "phase1")
    replace(record, files={**record.files, name: "0"}).write(folder / "phase1")
    with pytest.raises(StoreError, match=r"does not lie in the stage's folder|no such file"):
        Mirror(fresh).chain(folder, working=False)
    artifacts = (tmp_path / "fresh" / "mlartifacts").rglob("*")
    assert not any("mine" in path.read_text() for path in artifacts if path.is_file() and path.stat().st_size < 10)


def test_a_strangers_key_is_no_query(copied: tuple[Path, Store], fresh: Store) -> None:
    folder, _ = copied
    write_json(folder / CHAIN_FILE, vars(ChainFacts("k' OR 'a' = 'a", "mini", 0.013, 0)))
    with pytest.raises(StoreError, match="is not a key of this program"):
        Mirror(fresh).chain(folder, working=False)
