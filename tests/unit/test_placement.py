# SPDX-License-Identifier: Apache-2.0
"""Which CPU serves which queue, on machines made up for the purpose."""

import itertools
import os
import random

import pytest

from ublkd.supervisor import placement
from ublkd.supervisor.placement import Cpu, place, remark, topology


def machine(nodes=1, cores=4, threads=1):
    """CPUs numbered as Linux does on x86: first one thread of every core, then the others."""
    total = nodes * cores
    topo = {}
    for n in range(total * threads):
        core = n % total
        siblings = frozenset(core + t * total for t in range(threads))
        topo[n] = Cpu(n, siblings, core // cores)
    return topo


def split(topo, queues):
    """blk-mq's map, roughly: CPUs dealt to the queues in order."""
    masks = [set() for _ in range(queues)]
    for i, cpu in enumerate(sorted(topo)):
        masks[i % queues].add(cpu)
    return masks


def test_a_queue_per_cpu():
    topo = machine(cores=4)
    assert place([{0}, {1}, {2}, {3}], None, topo) == [0, 1, 2, 3]


def test_each_queue_stays_in_its_mask():
    topo = machine(nodes=2, cores=4, threads=2)
    masks = split(topo, 4)
    chosen = place(masks, None, topo)
    assert len(set(chosen)) == 4
    for cpu, mask in zip(chosen, masks, strict=True):
        assert cpu in mask


def test_cores_before_siblings():
    topo = machine(cores=4, threads=2)
    everything = [set(topo)] * 8
    chosen = place(everything, None, topo)
    assert sorted(chosen) == list(range(8))
    assert len({topo[c].core for c in chosen[:4]}) == 4
    assert chosen[:4] == [0, 1, 2, 3]


def test_a_sibling_when_the_mask_has_nothing_else():
    topo = machine(cores=2, threads=2)  # 0 and 2 share a core, 1 and 3
    assert place([{0, 2}, {0, 2}], None, topo) == [0, 2]


def test_stays_on_the_node_in_use():
    topo = machine(nodes=2, cores=4)
    chosen = place([set(topo)] * 4, None, topo)
    assert {topo[c].node for c in chosen} == {0}
    # The first queue's mask puts it on node 1: the others follow there while it has free cores.
    chosen = place([{5}] + [set(topo)] * 3, None, topo)
    assert chosen[0] == 5
    assert {topo[c].node for c in chosen} == {1}
    assert len(set(chosen)) == 4


def test_another_node_before_sharing_a_core():
    topo = machine(nodes=2, cores=2, threads=2)
    chosen = place([set(topo)] * 4, None, topo)
    assert len({topo[c].core for c in chosen}) == 4


def test_fewer_cpus_than_queues():
    topo = machine(cores=2)
    chosen = place([set(topo)] * 6, None, topo)
    assert [chosen.count(c) for c in (0, 1)] == [3, 3]
    assert place([set()] * 3, None, machine(cores=1)) == [0, 0, 0]


def test_masks_of_cpus_that_may_not_be_used():
    topo = {2: Cpu(2, frozenset({2}), 0), 3: Cpu(3, frozenset({3}), 0)}
    assert place([{0, 1}, {2}, {0, 3}], None, topo) == [2, 2, 3]
    for cpu in place([{0}, {1}, {9}], None, topo):
        assert cpu in topo


def test_same_input_same_answer():
    rng = random.Random(7)
    for _ in range(200):
        topo = machine(rng.choice([1, 2]), rng.choice([1, 2, 4]), rng.choice([1, 2]))
        queues = rng.randint(1, 2 * len(topo))
        masks = [set(rng.sample(sorted(topo), rng.randint(0, len(topo)))) for _ in range(queues)]
        shuffled = dict(rng.sample(sorted(topo.items()), len(topo)))
        chosen = place(masks, None, topo)
        assert chosen == place([set(m) for m in masks], None, shuffled)
        for cpu, mask in zip(chosen, masks, strict=True):
            assert cpu in topo
            assert not mask or cpu in mask
        # No CPU of a queue's mask is left idle while the queue takes a busier one.
        load = {c: 0 for c in topo}
        for cpu, mask in zip(chosen, masks, strict=True):
            assert load[cpu] == min(load[c] for c in (mask or topo))
            load[cpu] += 1


def test_listed_cpus_in_order():
    topo = machine(cores=8)
    masks = [set(topo)] * 3
    assert place(masks, [6, 2, 4], topo) == [6, 2, 4]


def test_listed_cpus_prefer_the_mask():
    topo = machine(cores=4)
    # Each queue's own place in the list is another queue's CPU: they swap.
    assert place([{0}, {1}], [1, 0], topo) == [0, 1]
    assert place([{2}, {3}, {0}, {1}], [0, 1, 2, 3], topo) == [2, 3, 0, 1]
    # None of the list is in the mask: its own place then.
    assert place([{0}, {1}], [2, 3], topo) == [2, 3]


@pytest.mark.parametrize("masks", list(itertools.permutations([{0}, {1}, {2}, {3}])))
def test_every_listed_cpu_is_used(masks):
    chosen = place(masks, [0, 1, 2, 3], machine(cores=4))
    assert sorted(chosen) == [0, 1, 2, 3]
    assert all(cpu in mask for cpu, mask in zip(chosen, masks, strict=True))


def test_list_shorter_than_the_queues():
    topo = machine(cores=4)
    chosen = place([set(topo)] * 5, [3, 1], topo)
    assert chosen == [3, 1, 3, 1, 3]
    assert place([{0}] * 3, [2], topo) == [2, 2, 2]


def test_listed_twice():
    assert place([{0, 1}] * 4, [0, 0, 1, 1], machine(cores=2)) == [0, 0, 1, 1]


def test_remarks():
    assert remark(4, 4, [0, 1, 2, 3]) == ""
    assert "4 queues were asked for, the driver made 2" in remark(4, 2, [0, 1])
    assert "3 queues share 1 CPU:" in remark(3, 3, [0, 0, 0])
    assert "3 queues share 2 CPUs:" in remark(3, 3, [0, 1, 0])
    assert ";" in remark(8, 4, [0, 0, 0, 0])


def test_topology_of_a_made_up_sysfs(tmp_path, monkeypatch):
    for n, (core, node) in enumerate([("0,2", 0), ("1,3", 1), ("0,2", 0), ("1,3", 1)]):
        (tmp_path / f"cpu{n}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{n}" / f"node{node}").mkdir()
        (tmp_path / f"cpu{n}" / "topology" / "core_cpus_list").write_text(core + "\n")
    (tmp_path / "cpu5").mkdir()
    monkeypatch.setattr(placement, "SYS_CPU", str(tmp_path))
    topo = topology([0, 1, 3, 5, 6])
    assert topo == {
        0: Cpu(0, frozenset({0, 2}), 0),
        1: Cpu(1, frozenset({1, 3}), 1),
        3: Cpu(3, frozenset({1, 3}), 1),
        5: Cpu(5, frozenset({5}), 0),
        6: Cpu(6, frozenset({6}), 0),
    }
    # CPU 2 may not be used, but its core counts as CPU 0's all the same.
    assert place([set(topo)] * 2, None, topo) == [0, 5]


def test_topology_of_this_machine():
    topo = topology()
    assert set(topo) == os.sched_getaffinity(0)
    for number, cpu in topo.items():
        assert cpu.number == number
        assert number in cpu.core
        assert cpu.node >= 0
