"""What a save writes: what changed, and no more; adapter sets are parts of their own."""

from __future__ import annotations

from pathlib import Path

import torch

from stackwise import train
from stackwise.checkpoint.store import Store
from stackwise.training import state
from stackwise.training.stored import open_run


def commits_of(config):
    result = train(config, sinks=[])
    store = Store(Path(result["run_dir"]) / "store")
    return store, store.commits()


def test_a_save_after_the_third_stage_writes_what_changed_and_a_manifest(tiny):
    config = tiny(
        checkpoint__keep_last=50,
        model__d_model=48,  # the manifest, some 25 KB, is small beside weights
        model__architecture__n_stacks=4,
        training__progressive__joint_tuning=False,
        model__tie_embeddings=False,
    )
    store, commits = commits_of(config)
    third, fourth = (store.find(f"stage-0{number}") for number in (3, 4))
    between = [commit for commit in commits if third.number < commit.number <= fourth.number]
    before = third
    for commit in between:
        new = {p.sha256: p.bytes for p in commit.parts.values()}
        old = {p.sha256 for c in commits if c.number < commit.number for p in c.parts.values()}
        changed = sum(size for sha256, size in new.items() if sha256 not in old)
        assert commit.bytes_written + commit.path.stat().st_size < 1.2 * changed
        # the frozen stacks and the embedding are those of the commit before, bit for bit
        for name in ("embedding/weights", "stack:s0/weights", "stack:s1/weights"):
            assert commit.parts[name].sha256 == before.parts[name].sha256
        before = commit
    frozen = sum(fourth.parts[f"stack:s{number}/weights"].bytes for number in range(3))
    assert fourth.bytes_total - fourth.bytes_written >= frozen


def test_every_stage_gives_its_logits_again(tiny):
    store, _ = commits_of(tiny())
    ids = torch.randint(0, 20, (2, 9))
    for number in (1, 2, 3):
        commit = store.find(f"stage-0{number}")
        opened = open_run(store.root.parent, commit=commit.id)
        again = state.load_rack(store, commit, store.meta(commit)).eval()
        assert len(opened.rack.stacks) == number
        assert torch.equal(opened.rack(ids), again(ids))


def test_training_adapters_writes_no_weights_of_the_stack_again(tiny):
    _, commits = commits_of(
        tiny(
            checkpoint__keep_last=50,
            checkpoint__save_interval=1,
            training__progressive__trunk_strategy="qlora",
            training__progressive__qlora_enabled=True,
            training__progressive__progressive_qlora=True,
            training__progressive__qlora_rank=2,
            training__progressive__progressive_qlora_rank=2,
            training__progressive__joint_tuning=False,
        )
    )
    first, *rest = [c for c in commits if "stack:s1/weights" in c.parts and "stack:s2/weights" not in c.parts]
    names = {name for name in first.parts if name.startswith("stack:s0/") and name.endswith("/weights")}
    assert names == {"stack:s0/weights", "stack:s0/lora.stack/weights", "stack:s0/lora.trunk/weights"}
    for commit in rest:
        assert commit.parts["stack:s0/weights"].sha256 == first.parts["stack:s0/weights"].sha256
        for name in names - {"stack:s0/weights"}:
            assert commit.parts[name].sha256 != first.parts[name].sha256
        first = commit
    listed = [t.name for t in first.parts["stack:s0/weights"].tensors]
    assert not any("lora" in name for name in listed)
