"""`stackwise ckpt`: every verb, as a table and as JSON, with its exit codes."""

import json
import re

import pytest
from safetensors.torch import load_file

from stackwise.checkpoint.store import Store


@pytest.fixture
def store(run_folder):
    """The store of runs/tiny: two stages of three steps, two commits."""
    return Store("runs/tiny/store")


def as_json(result):
    return json.loads(result.out)


def flip(path):
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def object_of(store, commit, part):
    return store.objects.path(store.find(commit).parts[part].sha256)


def test_ls_lists_commits_with_their_bytes_losses_and_why_they_stay(cli, store):
    store.pin("mine", store.find("stage-01"))
    rows = as_json(cli("ckpt", "ls", "tiny", "--json"))
    assert [row["commit"] for row in rows] == [commit.id for commit in store.commits()]
    first, last = rows[0], rows[-1]
    assert first["pins"] == ["stage-01", "mine"]
    assert last["kept"][0] == "newest"
    for row, commit in zip(rows, store.commits(), strict=True):
        assert row["bytes_new"] + row["bytes_shared"] == commit.bytes_total
        assert row["validation"] == store.scores()[commit.id]
        assert row["loss"] > 0
        assert row["kept"]
    assert sum(row["best"] for row in rows) == 1
    result = cli("ckpt", "ls", "tiny")
    assert result.code == 0
    for text in (first["commit"], "stage-01, pin mine", "newest"):
        assert text in result.out


def test_show_names_parts_stages_and_stacks(cli, store):
    facts = as_json(cli("ckpt", "show", "tiny", "stage-01", "--json"))
    commit = store.find("stage-01")
    assert facts["commit"] == commit.id
    assert {part["part"]: part["sha256"] for part in facts["parts"]} == {
        name: part.sha256 for name, part in commit.parts.items()
    }
    assert facts["meta"]["progress"]["step"] == commit.step
    result = cli("ckpt", "show", "tiny", "--tensors")
    for text in ("Rack: width 16", "Stages", "embedding/weights", "embedding.weight", "sha256"):
        assert text in result.out


def test_diff_lists_what_changed_and_nothing_else(cli, store):
    facts = as_json(cli("ckpt", "diff", "tiny", "stage-01", "latest", "--json"))
    a, b = store.find("stage-01"), store.latest()
    changed = {
        name
        for name in a.parts.keys() | b.parts.keys()
        if getattr(a.parts.get(name), "sha256", 0) != getattr(b.parts.get(name), "sha256", 0)
    }
    assert {part["name"] for part in facts["parts"]} == changed
    assert facts["bytes_equal"] == sum(part.bytes for name, part in b.parts.items() if name not in changed)
    weights = next(p for p in facts["parts"] if p["name"] == "embedding/weights" or p["state"] == "changed")
    assert all(tensor["distance"] > 0 for tensor in weights["tensors"] if tensor["state"] == "changed")
    assert "All parts are equal" in cli("ckpt", "diff", "tiny", "latest", a.id.replace(a.id, b.id)).out
    assert "changed" in cli("ckpt", "diff", "tiny", "stage-01", "latest").out


def test_du_counts_what_is_on_the_disk(cli, store):
    (store.quarantine / "old").write_bytes(b"12345")
    facts = as_json(cli("ckpt", "du", "tiny", "--json"))
    assert facts["quarantine"] == 5
    objects = sum(path.stat().st_size for path in (store.root / "objects").glob("*/*"))
    assert facts["objects"] == objects
    table = cli("ckpt", "du", "tiny").out
    assert "stack:s0" in table
    assert "quarantine" in table


def test_cat_shows_statistics_or_writes_the_tensor(cli, store, run_folder):
    value = store.load(store.latest(), "embedding/weights")["embedding.weight"]
    facts = as_json(cli("ckpt", "cat", "tiny", "latest", "embedding.weight", "--values", "3", "--json"))
    assert facts["values"] == value.reshape(-1)[:3].tolist()
    assert facts["mean"] == pytest.approx(float(value.double().mean()))
    assert facts["shape"] == list(value.shape)
    target = run_folder / "one.safetensors"
    assert cli("ckpt", "cat", "tiny", "latest", "embedding.weight", "--out", target).code == 0
    assert load_file(target)["embedding.weight"].equal(value)
    again = cli("ckpt", "cat", "tiny", "latest", "embedding.weight", "--out", target)
    assert again.code == 2
    assert "exists already" in again.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "tiny", "stage-1"], "did you mean 'stage-01'"),
        (["show", "tinny"], "did you mean 'tiny'"),
        (["cat", "tiny", "latest", "embedding.weigth"], "did you mean 'embedding.weight'"),
        (
            ["cat", "tiny", "latest", "embedding.weight", "--part", "norm/weights"],
            "it is in embedding/weights",
        ),
        (["verify", "tiny", "--subset", "0%"], "is no share"),
        (["verify", "tiny", "--subset", "ten"], "is no share"),
        (["verify", "tiny", "--all", "--subset", "10%"], "exclude each other"),
        (["verify", "tiny", "stage-01", "--all"], "names one commit"),
        (["pin", "tiny", "latest", "stage-09"], "cannot be called"),
        (["pin", "tiny", "latest", "no such"], "cannot be called"),
        (["unpin", "tiny", "nothing"], "no pin is called"),
        (["unpin", "tiny", "stage-01"], "--drop-stages"),
        (["prune", "tiny", "--keep-last", "0"], "--keep-last"),
        (["verfy", "tiny"], "No such command"),
    ],
)
def test_mistakes_get_exit_code_2_and_a_way_out(cli, store, words, message):
    before = sorted(path for path in store.root.rglob("*") if path.is_file())
    result = cli("ckpt", *words)
    assert result.code == 2
    assert message in result.err
    assert sorted(path for path in store.root.rglob("*") if path.is_file()) == before


def test_verify_reads_everything_and_remembers_it(cli, store):
    result = cli("ckpt", "verify", "tiny", "--all", "--json")
    assert result.code == 0
    facts = as_json(result)
    assert facts["whole"] == [commit.id for commit in store.commits()]
    assert set(store.verified()) == set(facts["whole"])
    assert all(row["verified"] for row in as_json(cli("ckpt", "ls", "tiny", "--json")))
    part = as_json(cli("ckpt", "verify", "tiny", "--subset", "10%", "--json"))
    assert 0 < part["objects"] < facts["objects"]
    assert "1 commit whole" in cli("ckpt", "verify", "tiny").out


def test_verify_beside_a_writer_reads_without_remembering(cli, store):
    with store.lock():
        result = cli("ckpt", "verify", "tiny")
    assert result.code == 0
    assert "not remembered" in result.err
    assert store.verified() == {}


def test_verify_names_what_is_damaged_and_repair_sets_it_aside(cli, store):
    path = object_of(store, "latest", "stack:s1/weights")
    newest, first = store.latest().id, store.find("stage-01").id
    flip(path)
    result = cli("ckpt", "verify", "tiny", "--all")
    assert result.code == 3
    for text in (str(path), "stack:s1/weights", f"hurts {newest}", "stackwise ckpt repair"):
        assert text in result.err
    assert first not in result.err
    facts = as_json(cli("ckpt", "verify", "tiny", "--all", "--json"))
    assert facts["damage"][0]["commits"] == [newest]
    # every verb that needs the damaged part says the same; those that do not go on
    assert (
        cli(
            "ckpt", "cat", "tiny", "latest", next(iter(store.latest().parts["stack:s1/weights"].tensors)).name
        ).code
        == 3
    )
    assert cli("ckpt", "ls", "tiny").code == cli("ckpt", "du", "tiny").code == 0
    assert cli("ckpt", "prune", "tiny", "--yes").code == 3

    done = as_json(cli("ckpt", "repair", "tiny", "--json"))
    assert done["lost"] == [newest]
    assert done["whole"][-1] == store.latest().id != newest
    assert (store.quarantine / path.name).exists()
    assert cli("ckpt", "verify", "tiny", "--all").code == 0
    assert cli("generate", "runs/tiny", "--max-new-tokens", "2").code == 0


def test_repair_rebuilds_the_small_files(cli, store):
    scores = store.scores()
    assert scores
    for name in ("scores", "latest"):
        (store.root / "refs" / name).unlink()
    assert cli("ckpt", "repair", "tiny").code == 0
    assert store.scores() == scores
    assert (store.root / "refs" / "latest").read_text().strip() == store.latest().id
    flip(store.root / "refs" / "scores")
    listed = cli("ckpt", "ls", "tiny")
    assert listed.code == 0
    assert "ckpt repair" in listed.err
    assert cli("ckpt", "repair", "tiny").code == 0
    assert store.scores() == scores


def test_repair_without_a_whole_commit_says_so(cli, store, damaged):
    damaged.object()
    result = cli("ckpt", "repair", "tiny")
    assert result.code == 3
    assert "no whole commit" in result.err
    # and no run starts over what may come back
    names = sorted(path.name for path in store.quarantine.iterdir())
    again = cli("train", "tiny.yaml", "--quiet")
    assert again.code == 3
    assert sorted(path.name for path in store.quarantine.iterdir()) == names


def test_prune_shows_first_and_deletes_only_with_yes(cli, store):
    before = [commit.id for commit in store.commits()]
    assert len(before) > 1
    shown = as_json(cli("ckpt", "prune", "tiny", "--keep-last", "1", "--drop-stages", "--json"))
    assert shown["commits"] == before[:-1]
    assert shown["kept"] == {before[-1]: ["newest"]}
    table = cli("ckpt", "prune", "tiny", "--keep-last", "1", "--drop-stages")
    command = re.search(r"stackwise (ckpt prune .*)", table.out)[1]
    assert [commit.id for commit in store.commits()] == before
    assert cli(*command.split()).code == 0
    assert [commit.id for commit in store.commits()] == before[-1:]
    assert cli("ckpt", "verify", "tiny").code == 0


def test_prune_never_touches_pins(cli, store):
    first = store.commits()[0].id
    assert as_json(cli("ckpt", "pin", "tiny", "stage-01", "mine", "--json")) == {
        "pin": "mine",
        "commit": first,
    }
    cli("ckpt", "prune", "tiny", "--keep-last", "1", "--drop-stages", "--yes")
    assert store.find("mine").id == first
    assert cli("ckpt", "unpin", "tiny", "mine").code == 0
    cli("ckpt", "prune", "tiny", "--keep-last", "1", "--drop-stages", "--yes")
    assert first not in [commit.id for commit in store.commits()]


@pytest.mark.parametrize("words", [["pin", "latest", "mine"], ["prune", "--yes"], ["repair"]])
def test_writing_beside_another_writer_is_exit_code_4(cli, store, words):
    with store.lock():
        verb, *rest = words
        result = cli("ckpt", verb, "tiny", *rest)
        assert cli("ckpt", "prune", "tiny").code == 0  # a look needs no lock
    assert result.code == 4
    assert "pid" in result.err


def test_a_run_without_commits_has_none_to_show(cli, run_folder):
    (run_folder / "runs" / "empty").mkdir()
    (run_folder / "runs" / "empty" / "config.yaml").write_text("{}")
    result = cli("ckpt", "ls", "empty")
    assert result.code == 2
    assert "no commit yet" in result.err


def test_train_falls_back_only_when_it_is_told_to(cli, store):
    newest = store.latest()
    flip(object_of(store, "latest", "stack:s1/weights"))
    refused = cli("train", "tiny.yaml", "--quiet")
    assert refused.code == 3
    assert "ckpt repair" in refused.err
    assert store.latest().id == newest.id

    done = cli("train", "tiny.yaml", "--quiet", "--allow-fallback")
    assert done.code == 0
    assert "falling back to commit" in done.err
    assert store.latest().step == newest.step
    assert {name: part.sha256 for name, part in store.latest().parts.items()} == {
        name: part.sha256 for name, part in newest.parts.items()
    }
    assert (store.quarantine / f"{newest.id}.json").exists()
    # where nothing is damaged the option changes nothing
    whole = cli("train", "tiny.yaml", "--quiet", "--allow-fallback")
    assert (whole.code, "falling back" in whole.err) == (0, False)
    assert cli("train", "tiny.yaml", "checkpoint.overwrite=true", "--allow-fallback").code == 2


def test_a_fork_is_trained_under_other_settings(cli, store):
    made = as_json(cli("ckpt", "fork", "tiny", "stage-01", "hotter", "training.optimizer.lr=0.01", "--json"))
    assert made == {
        "run": "runs/hotter",
        "from": store.find("stage-01").id,
        "step": store.find("stage-01").step,
    }
    assert "fork of runs/tiny" in cli("ckpt", "show", "hotter").out
    assert cli("train", "runs/hotter/config.yaml", "--quiet").code == 0
    facts = as_json(cli("ckpt", "diff", "tiny", "latest", "latest", "--with", "hotter", "--json"))
    assert [row["key"] for row in facts["config"]] == ["training.optimizer.lr"]
    assert facts["steps"] == 0
    table = cli("ckpt", "diff", "tiny", "latest", "latest", "--with", "hotter").out
    assert "training.optimizer.lr" in table
    assert "training.optimizer.lr at step" in cli("ckpt", "show", "hotter").out
    taken = cli("ckpt", "fork", "tiny", "latest", "hotter")
    assert (taken.code, "exists already" in taken.err) == (2, True)
    other = cli("ckpt", "fork", "tiny", "latest", "wider", "model.d_model=32")
    assert (other.code, "checkpoint.init_from=" in other.err) == (2, True)


def test_the_way_out_of_a_changed_setting_works(cli, store):
    refused = cli("train", "tiny.yaml", "training.optimizer.lr=0.01")
    assert refused.code == 7
    assert "stackwise ckpt fork" in refused.err


def test_export_and_import_bring_a_commit_to_a_run_of_its_own(cli, store, run_folder):
    made = as_json(cli("ckpt", "export", "tiny", "stage-01", "out", "--json"))
    assert made["commit"] == store.find("stage-01").id
    assert {
        "SHA256SUMS",
        "config.yaml",
        "tokenizer.json",
        "metrics.jsonl",
        "stack.s0.weights.safetensors",
    } <= set(made["files"])
    back = as_json(cli("ckpt", "import", "out", "runs/back", "--json"))
    assert back["commit"] == made["commit"]
    assert cli("generate", "back", "--max-new-tokens", "2").code == 0
    assert cli("train", "runs/back/config.yaml", "--quiet").code == 0
    assert {n: p.sha256 for n, p in Store("runs/back/store").latest().parts.items()} == {
        n: p.sha256 for n, p in store.latest().parts.items()
    }
    flip(run_folder / "out" / "tokenizer.json")
    assert cli("ckpt", "import", "out", "runs/third").code == 3
    assert cli("ckpt", "import", "nowhere", "runs/third").code == 2
    assert cli("ckpt", "export", "tiny", "latest", "out").code == 2
    assert cli("ckpt", "export", "tiny", "latest", "new", "--to", "pt").code == 2


def test_a_commit_is_exported_for_other_programs(cli, store):
    assert (
        "model.safetensors"
        in as_json(cli("ckpt", "export", "tiny", "stage-01", "hf", "--to", "hf", "--json"))["files"]
    )
    assert cli("export", "tiny", "--commit", "stage-01", "--out", "hf2").code == 0
    assert load_file("hf/model.safetensors").keys() == load_file("hf2/model.safetensors").keys()
    assert len(load_file("hf/model.safetensors")) < len(
        load_file(
            f"{json.loads(cli('ckpt', 'export', 'tiny', 'latest', 'whole', '--to', 'hf', '--json').out)['folder']}/model.safetensors"
        )
    )


def test_all_verbs_explain_themselves(cli):
    listed = cli("ckpt", "--help").out
    for verb in ["ls", "show", "diff", "du", "cat", "verify", "prune", "pin", "unpin", "repair"]:
        assert re.search(rf"^  {verb} ", listed, re.MULTILINE)
        page = cli("ckpt", verb, "--help")
        assert page.code == 0
        assert "Examples:" in page.out
        assert "--json" in page.out
