"""What torch needs around the capture of a round: shown on a CPU, with stand-ins for torch's own parts."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from tape import Tape
from test_rounds import Asks, captured, check_same, texts
from test_sampler import sample
from test_skd_trainer import make_trainer
from tiny import tiny_model

from skd_trl.sampling import ragged_cache
from skd_trl.sampling.acceptance import TopK
from skd_trl.sampling.cuda_graph import CudaGraph
from skd_trl.sampling.interleaved import Execution, interleaved_sample
from skd_trl.sampling.participants import LocalParticipant
from skd_trl.sampling.rounds import Rounds
from skd_trl.training import machine, shown_run
from skd_trl.training.machine import Machine
from skd_trl.training.memory_count import Window, sampling_bytes
from skd_trl.training.memory_places import places_now
from skd_trl.training.memory_plan import GIB, fitted_plan


def pair():
    return tiny_model(seed=1), tiny_model(seed=2)


class Once:
    """A capture that does what it records: Dynamo traces nothing under the modes of a `Tape`."""

    is_open = False

    def trial(self):
        return nullcontext()

    def capture(self, play):
        Once.is_open = True
        try:
            play()
        finally:
            Once.is_open = False

    def replay(self):
        pass


def test_nothing_is_compiled_inside_a_capture(monkeypatch):
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        traced.append(Once.is_open)
        return graph.forward

    compiled = torch.compile(ragged_cache._forward, dynamic=False, fullgraph=True, backend=backend)
    monkeypatch.setattr(ragged_cache, "_compiled", lambda: compiled)
    rounds, (student, teacher) = Rounds(capture=True, compile=True, make_graph=Once), pair()
    with torch.autocast("cpu", torch.bfloat16):
        texts(student, teacher, rounds=rounds, num_draft_tokens=3)
    assert rounds.graphs and rounds.reason is None
    assert len(traced) == 2 and not any(traced)
    assert torch.is_autocast_cache_enabled()
    torch._dynamo.reset()


def test_a_rule_that_waits_is_found_before_anything_is_captured():
    rounds, before = captured(), Tape.num_captures
    uniforms = torch.rand((2, 16, 3), generator=torch.Generator().manual_seed(0))
    settings = {"prompts": [[5, 9, 200], [7, 8]], "noise": uniforms, "max_new_tokens": 16}
    check_same(sample(*pair(), rule=Asks(60), rounds=rounds, **settings), sample(*pair(), rule=TopK(60), **settings))
    assert "_local_scalar_dense" in rounds.reason and Tape.num_captures == before and not rounds.is_capturing


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda's parts, which write down what is asked of them. `fails`: ending a capture raises, as after a wait inside."""
    done = SimpleNamespace(log=[], fails=False, mode=0, stream="default", pools=0)

    @contextmanager
    def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        done.log.append(("begin", pool))
        done.stream = stream
        yield
        if done.fails and pool is not None:
            raise RuntimeError("operation failed due to a previous error during capture")
        done.stream = "default"
        done.log.append(("end", pool))

    def handle():
        done.pools += 1
        return 0, done.pools

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: done.stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(done, "stream", stream))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: done.mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(done, "mode", mode))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", handle)
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda device, pool: done.log.append(("given back", pool)), raising=False
    )
    return done


def test_a_trial_lets_no_wait_pass_and_leaves_the_mode_as_it_was(cuda):
    with pytest.raises(RuntimeError), CudaGraph((0, 1), "side").trial():
        assert cuda.mode == "error"
        raise RuntimeError
    assert cuda.mode == 0


def test_a_capture_that_fails_leaves_stream_allocator_and_generators_as_they_were(cuda):
    cuda.fails = True
    with pytest.raises(RuntimeError, match="previous error"):
        CudaGraph((0, 1), "side").capture(lambda: None)
    # The end of a capture without a pool of ours is what generators wait for.
    assert cuda.log[:3] == [("begin", (0, 1)), ("given back", (0, 1)), ("begin", None)]
    assert cuda.stream == "default"


def test_a_pool_takes_no_graphs_after_its_own_are_gone_and_one_stream_is_kept(cuda):
    rounds, key = Rounds(), "a shape"
    rounds.is_capturing = rounds.is_tried = True
    cpu, pools = torch.device("cpu"), []
    for _ in range(2):
        rounds.warm[key] = rounds.warm["another"] = None
        for shape in (key, "another"):
            rounds.run(shape, lambda stopwatch: {}, cpu, lambda: lambda: None)
        pools += [graph.pool for graph, _, _ in rounds.graphs.values()]
        assert {graph.stream for graph, _, _ in rounds.graphs.values()} == {"side"}
        rounds.forget_graphs()
    assert pools == [(0, 1)] * 2 + [(0, 2)] * 2


def test_caches_that_may_not_be_kept_are_given_back_with_their_graphs():
    models, kept = pair(), captured()
    texts(*models, rounds=kept)
    assert kept.graphs and kept.num_kept_bytes > 0
    for most, is_kept in ((kept.num_kept_bytes, True), (kept.num_kept_bytes - 1, False)):
        rounds = captured()
        rounds.most_kept = most
        texts(*models, rounds=rounds)
        assert bool(rounds.graphs) == (rounds.num_kept_bytes > 0) == is_kept


def test_a_plan_says_how_much_may_be_kept_and_the_trainer_keeps_to_it(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    models = trainer.model, trainer._inner_teacher

    def plan_of(memory):
        one = Machine(torch.device("cpu"), memory, is_gpu=True)
        return fitted_plan(*models, one, trainer.args, longest_prompt=64)

    roomy = plan_of(GIB)
    caches, kept = roomy.sampling["caches"], sum(roomy.training[name] for name in ("kept caches", "graphs"))
    assert roomy.sampling["graphs"] == roomy.training["graphs"] > 0
    assert roomy.most_kept == int(0.8 * GIB) - sum(roomy.held.values()) - sum(roomy.training.values()) + caches
    just = int((sum(roomy.held.values()) + sum(roomy.training.values())) / 0.8)
    assert "kept caches" in plan_of(just + 8).training
    tight = plan_of(int(just - caches))
    assert "kept caches" not in tight.training and tight.most_kept < caches
    assert sum(tight.training.values()) == sum(roomy.training.values()) - kept

    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(shown_run.Machine, "of", lambda accelerator: Machine(torch.device("cpu"), GIB, is_gpu=True))
    assert trainer._rounds.most_kept is None
    trainer._log_plan()
    assert trainer._rounds.most_kept == pytest.approx(roomy.most_kept, rel=0.05)


def test_caches_that_are_kept_count_as_free_for_the_next_window(monkeypatch):
    (student, teacher), one = pair(), Machine(torch.device("cpu"), GIB)
    window = Window(8, 8, 16, 16, 8)
    parts, _ = sampling_bytes(student, teacher, one, window, False, False)
    needed = int(sum(parts.values()) / 0.9) + 8 * 16 * 4 * teacher.config.hidden_size * 2
    for free, kept, places in ((needed, 0, 8), (needed - parts["caches"], parts["caches"], 8)):
        monkeypatch.setattr(machine, "free_bytes", lambda device, now=False, free=free: free)
        assert places_now(student, teacher, one, window, kept) == places
    assert places_now(student, teacher, one, window) < 8


def test_graphs_have_memory_of_a_round_for_themselves():
    one, window = Machine(torch.device("cpu"), GIB), Window(8, 8, 64, 16, 8)
    (plain, per_place), (parts, more) = (sampling_bytes(*pair(), one, window, False, yes) for yes in (False, True))
    assert parts["graphs"] >= parts.get("logits of a draft", 0) and more - per_place == parts["graphs"] // 8
    assert sum(parts.values()) == sum(plain.values()) + parts["graphs"]


class WaitsAtTheEnd(LocalParticipant):
    def keep(self, block, count):
        super().keep(block, count)
        self.most = int(count.max())


@pytest.mark.parametrize("architecture, num_draft_tokens", [("qwen3_5_text", 1), ("qwen3_5_text", 3), ("llama", 1)])
@pytest.mark.parametrize("where", ["in the rule", "in keep"])
def test_a_round_that_waits_is_run_again_from_where_it_was(where, architecture, num_draft_tokens):
    rounds, uniforms = captured(), torch.rand((2, 16, 3), generator=torch.Generator().manual_seed(0))
    texts = []
    for one in (None, rounds):
        student, teacher = tiny_model(architecture, seed=1), tiny_model(architecture, seed=2)
        kind, rule = (LocalParticipant, Asks(60)) if where == "in the rule" else (WaitsAtTheEnd, TopK(60))
        texts.append(
            interleaved_sample(
                LocalParticipant(student), kind(teacher), torch.tensor([[5, 9, 200], [7, 8, 3]]), torch.ones(2, 3),
                accept=rule, max_new_tokens=16, eos_token_ids=[], noise=uniforms,
                execution=Execution(num_draft_tokens, rounds=one),
            )
        )  # fmt: skip
    check_same(*texts)
    assert rounds.reason is not None and not rounds.graphs
