"""The same faults on other ways of saving are counted by the same program."""

from __future__ import annotations


def test_what_ours_keeps_and_what_the_others_lose(fault_seed: int) -> None:
    from reliability import peers

    record = peers.run(4, fault_seed)
    rows = {row["peer"]: row for row in record["peers"]}
    assert record["failures"] == []
    assert rows["StackWise"]["kills"] == {"as saved": 4}
    # "as saved": the bit was one of the hundred bytes in LOCK and refs/latest, from which no tensor is read
    assert rows["StackWise"]["flips"].keys() <= {"found", "as saved"}
    assert rows["StackWise"]["flips"]["found"] > 10
    assert rows["StackWise"]["full"] == {"as saved": 2}
    # a flipped bit among 2.4 MB of numbers is a number
    assert all(row["flips"].get("other tensors", 0) > 10 for name, row in rows.items() if name != "StackWise")
    assert rows["torch.save"]["full"] == {"nothing loads": 2}


def test_losses_of_ours_are_failures(fault_seed: int) -> None:
    from reliability import peers

    careless = peers.Peer("StackWise", "stackwise", peers.PEERS[1].save, peers.PEERS[1].load)
    record = peers.run(2, fault_seed, peers=[careless])
    assert record["failures"]
