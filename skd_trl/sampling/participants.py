"""Who takes part in writing responses: a participant owns its model, prompts, positions and cache, and how it goes back.

The student's part is `step`, the teacher's `judge`; both are told with `keep` what happened to a block. Between
`begin_round` and `keep` a participant neither asks the device for a number nor makes a tensor whose shape depends on data:
a round can be captured. What decides shapes (`admit`, `prefill`, `move_row`, `begin_round`) is outside it.

A new kind (a model behind a server, one with recurrent state) is a subclass of `Participant`. The base class does nothing: it
takes the place of a student for a rule that lets none draft (`never`), and of a teacher for one that asks none (`always`).

Shapes: B prompts, R places of the cache, N places in use, G draft, Q tokens of a prefill, V vocabulary, H hidden.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .admission import positions_of, prove
from .draft import Judgement
from .nucleus import Nucleus
from .prefill import cost_of_forward, groups_of_equal_length, left_padded, prefill_groups
from .prompts import Prompts
from .ragged_cache import eval_mode, has_shards, of_rows
from .recurrent_state import Reading
from .rounds import Rounds, Same
from .sampling_params import SamplingParams, on_device


@dataclass(frozen=True)
class Setting:
    """What is known of a sampling before it starts: `name` (`"student"` or `"teacher"`), `num_places` R, `max_new_tokens` T,
    `longest_draft` the largest G, how its `rounds` are run (they keep buffers and caches, by name), and how its draws find the
    `nucleus`."""

    name: str
    num_places: int
    max_new_tokens: int
    longest_draft: int
    rounds: Rounds
    nucleus: Nucleus


class Participant:
    """Takes part by doing nothing: proposes no token and judges none.

    Args:
        sampling ([`SamplingParams`], *optional*): how its draws are shaped.
    """

    vocab_size: int | None = None  # how many ids its distributions are over, if it has any

    def __init__(self, sampling: SamplingParams = SamplingParams()):  # noqa: B008 (frozen)
        self.sampling = sampling

    def check(self, name: str, prompts: Prompts, max_new_tokens: int) -> None:
        """Raises `ValueError`, calling it `name`, if it cannot continue the student's `prompts` by so many tokens."""

    @contextmanager
    def session(self, prompts: Prompts, setting: Setting):
        """The time of one sampling; whatever it allocates and changes is given back afterwards. `prompts` are the student's."""
        self.device = prompts.ids.device
        yield

    def admit(self, places: list[int], prompts: list[int]) -> list[Callable[[], None]]:
        """Takes these prompts into these places. Returns the forwards that fill the cache with them, the longest last."""
        return []

    def prefill(self, forwards: list[Callable[[], None]], num_forwards: int) -> None:
        """Runs these forwards, and idle ones before them if other ranks run more."""

    def move_row(self, source: int, target: int) -> None:
        """Gives the row in place `source` the place `target`."""

    @property
    def can_be_captured(self) -> bool:
        """Whether its part of a round is nothing but work for the device, on tensors that are kept in `Setting.rounds`."""
        return type(self) is Participant

    def begin_round(self, rows: list[tuple[int, int]], num_rows: int, num_draft: int) -> None:
        """Sets the shapes of a round of N = `num_rows` places: `rows` are (prompt, tokens written) of those in use."""
        self.num_rows = num_rows

    def round_key(self) -> tuple:
        """What its part of the round that was begun depends on, besides N, G and what is in its tensors."""
        return ()

    def begin_block(self, inputs: torch.Tensor, columns: torch.Tensor) -> None:
        """Before it first steps or judges in a round: is told, on the device, what is known of its inputs, (N, 1) or (N, G), and which
        tokens of the response the block will be, `columns` (N, G), counted from 0. The first input is the last token kept, of the
        student's prompt where none is; before `judge` the proposals but the last follow."""

    def step(self, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws one token more for every row, from `uniforms` (N,): the tokens (N,), -100 for none, and the raw logits (N, V)
        they were drawn from. The first step of a round is fed with the last token kept, each other one with the token drawn
        before."""
        return torch.full_like(uniforms, -100, dtype=torch.long), uniforms.new_empty(self.num_rows, 0)

    def judge(self, proposals: torch.Tensor) -> Judgement:
        """The distributions by which the `proposals` (N, G) are judged, in one forward on the inputs that it was told of."""
        return Judgement(torch.empty((*proposals.shape, 0), device=self.device), {})

    def keep(self, block: torch.Tensor, count: torch.Tensor) -> None:
        """Of `block` (N, G) the first `count` (N,) tokens are kept: goes back to where only these were read."""

    def hold(self) -> Callable[[], None]:
        """What puts back what a round changes and reads, where it may be run again; asked of those that can be captured."""
        return lambda: None

    def idle(self, num_tokens: int = 1) -> None:
        """One forward of nothing, where other ranks run one of `num_tokens` and the model's forward is collective."""


class LocalParticipant(Participant):
    """A causal language model of transformers in this process, on a key/value cache in which each row has its own length.

    Args:
        model ([`~transformers.PreTrainedModel`] or a `PeftModel` around one): unwrapped. It runs in eval mode; each
            module's mode is put back afterwards.
        sampling ([`SamplingParams`], *optional*): how its draws are shaped.
        prompts ([`Prompts`], *optional*): what it reads instead of the student's prompts, one for each of them.
        vocab_size (`int`, *optional*): how many of its ids count. Give the number that student and teacher share if their
            heads are padded to different widths. Defaults to all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        *,
        prompts: Prompts | None = None,
        vocab_size: int | None = None,
    ):
        super().__init__(sampling)
        self.model, self.own_prompts = model, prompts
        self.vocab_size = model.config.get_text_config().vocab_size if vocab_size is None else vocab_size

    def check(self, name: str, prompts: Prompts, max_new_tokens: int) -> None:
        own = prompts if self.own_prompts is None else self.own_prompts
        config = self.model.config.get_text_config()
        if not 0 < self.vocab_size <= config.vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be between 1 and {config.vocab_size}, all that the {name} has."
            )
        room = positions_of(config)
        if room is not None and own.longest + max_new_tokens > room:
            raise ValueError(
                f"The longest prompt has {own.longest} tokens; with max_new_tokens={max_new_tokens} it needs "
                f"{own.longest + max_new_tokens} positions, but the {name} has {room} to sample in. Shorten prompts or "
                "max_new_tokens."
            )
        own.check(name, len(prompts), self.vocab_size)

    @contextmanager
    def session(self, prompts: Prompts, setting: Setting):
        self.proof = prove(self.model)
        self.prompts = prompts if self.own_prompts is None else self.own_prompts
        self.device = self.prompts.ids.device
        # A block may run over the end of its row, and of the model's positions. What is beyond these shares the last one, which no
        # full row reads.
        num_slots = self.prompts.longest + setting.max_new_tokens + setting.longest_draft - 1
        self.rounds, self.nucleus = setting.rounds, setting.nucleus
        self.decoder = self.rounds.decoder(setting.name, self.model, setting.num_places, num_slots)
        room = positions_of(self.model.config.get_text_config())
        self.last_position = min(self.decoder.num_slots if room is None else room, self.decoder.num_slots) - 1
        self.may_run_over = self.last_position < num_slots - 1
        self.last_of_prompt, self.start = (  # the last token of each place's prompt, and its position
            self.rounds.buffer(f"{name} of {setting.name}", (setting.num_places,), torch.long, self.device).zero_()
            for name in ("last_of_prompt", "start")
        )
        block = (setting.num_places * setting.longest_draft,)
        self.block_positions = self.rounds.buffer(f"positions of {setting.name}", block, torch.long, self.device)
        # Is there before a round needs it, and for as long as a graph that reads it: its key has it.
        self.temperature = on_device(self.sampling.temperature, self.device)
        self.num_shared = 0  # first tokens of all prompts, whose keys and values every place has
        if self.decoder.states is not None:
            self.decoder.states.forget_beginning()
        self.is_new = True
        try:
            with eval_mode(self.model), self.rounds.products(self.model):
                yield
        finally:
            del self.decoder
            if setting.name == "student":
                self.rounds.packed.forget_trained(self.model)

    def admit(self, places: list[int], prompts: list[int]) -> list[Callable[[], None]]:
        forwards = self._share_beginning() if self.is_new and prompts else []
        if prompts:
            self.is_new = False
            index, which = (torch.tensor(x, dtype=torch.long, device=self.device) for x in (places, prompts))
            self.last_of_prompt[index] = self.prompts.ids[which, -1]
            self.start[index] = self.prompts.lengths[which] - 1
            if self.decoder.states is not None:
                self.decoder.states.begin_rows(places)
        lengths = [self.prompts.host_lengths[prompt] - 1 - self.num_shared for prompt in prompts]
        if self.proof.padding is None or (self.proof.padding == "left" and self.num_shared):
            groups = groups_of_equal_length(lengths)
        else:
            groups = prefill_groups(lengths, cost_of_forward(self.device))
        if (
            self.decoder.states is not None
        ):  # a prompt of one token has its state already, and beside one of two Mamba 2 reads padding
            groups = [[j for j in group if lengths[j]] for group in groups]
        for group in groups:
            if num_tokens := max((lengths[j] for j in group), default=0):
                of_group = ([values[j] for j in group] for values in (places, prompts))
                forwards.append(partial(self._fill, *of_group, num_tokens))
        return forwards

    def _share_beginning(self) -> list[Callable[[], None]]:
        """One forward over what all prompts begin with, if that costs less than running it for each of them."""
        tokens = self.prompts.shared_beginning()
        num_shared = tokens.shape[1]
        # What follows on a state cannot be padded: a forward for each length.
        num_more = len(set(self.prompts.host_lengths)) if self.proof.padding == "left" else 1
        saves = (len(self.prompts) - 1) * num_shared >= num_more * cost_of_forward(self.device)
        if not saves or not self.proof.continues:
            return []
        self.num_shared = num_shared

        def forward():
            positions = torch.arange(num_shared, device=self.device)[None]
            reading = Reading(is_beginning=True)
            self.decoder(tokens, positions, num_slots_in_use=num_shared, without_logits=True, reading=reading)
            self.decoder.spread_first_row(num_shared)

        return [forward]

    def _fill(self, places: list[int], prompts: list[int], num_tokens: int) -> None:
        """Runs all but the last token of these prompts, right-padded with anything: what is written beyond the end of a prompt
        is overwritten before it is read."""
        start, stop = self.num_shared, self.num_shared + num_tokens
        tokens = self.prompts.tokens(torch.tensor(prompts, device=self.device), start, stop)
        positions, padding = torch.arange(start, stop, device=self.device).expand_as(tokens), None
        if self.proof.padding == "left" and not start:
            lengths = self.prompts.lengths[torch.tensor(prompts, device=self.device)] - 1
            tokens, positions, padding = left_padded(tokens, positions, lengths)
        reading = Reading(is_beginning=start == 0, padding=padding)
        self.decoder(tokens, positions, rows=places, num_slots_in_use=stop, without_logits=True, reading=reading)

    def prefill(self, forwards: list[Callable[[], None]], num_forwards: int) -> None:
        # Those that wait do so first: the longest forwards of all ranks then meet.
        for forward in [self.idle] * (num_forwards - len(forwards)) + forwards:
            forward()

    def move_row(self, source: int, target: int) -> None:
        self.decoder.move_row(source, target)
        for values in (self.last_of_prompt, self.start):
            values[target] = values[source]

    @property
    def can_be_captured(self) -> bool:
        return not has_shards(self.model)

    def begin_round(self, rows: list[tuple[int, int]], num_rows: int, num_draft: int) -> None:
        super().begin_round(rows, num_rows, num_draft)
        longest = max(self.prompts.host_lengths[prompt] + num_written for prompt, num_written in rows)
        self.num_slots_in_use = self.rounds.num_slots(longest + num_draft - 1, self.decoder.num_slots)
        states, may_miss = self.decoder.states, self.nucleus.num_candidates(self.vocab_size) is not None
        if states is not None and states.begin_round(num_draft, may_keep_none=may_miss):
            self.rounds.forget_graphs()  # they go on with the buffers as they were

    def round_key(self) -> tuple:
        which = self.num_slots_in_use, self.last_position, self.may_run_over, self.vocab_size, self.sampling
        return *which, Same(self.temperature)

    def begin_block(self, inputs: torch.Tensor, columns: torch.Tensor) -> None:
        if self.own_prompts is not None:
            # Where nothing is written yet, it goes on from another token than the student.
            last_of_prompt = self.last_of_prompt[: self.num_rows, None]
            inputs = torch.where(columns[:, : inputs.shape[1]] == 0, last_of_prompt, inputs)
        self.inputs, self.columns, self.num_ahead = inputs, columns, 0

    def step(self, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.num_ahead == 0:  # once for all steps of the round, one step after the other: (G N, 1)
            self.positions = self._positions(self.columns.T, self.start[: self.num_rows]).view(-1, 1)
            self.masks = self.decoder.masks(self.positions, self.num_slots_in_use)
        rows = slice(self.num_ahead * self.num_rows, (self.num_ahead + 1) * self.num_rows)
        logits = self.decoder(
            self.inputs,
            self.positions[rows],
            num_slots_in_use=self.num_slots_in_use,
            reading=Reading(step=self.num_ahead),
            masks=of_rows(self.masks, rows),
        )[1]
        logits = logits[:, 0, : self.vocab_size]
        tokens = self.nucleus.draw(logits, self.sampling, uniforms)
        self.inputs, self.num_ahead = tokens[:, None], self.num_ahead + 1
        return tokens, logits

    def judge(self, proposals: torch.Tensor) -> Judgement:
        # The columns are a transposed view, and some models ask for positions in the order of the rows (XGLM's `view`).
        room = self.block_positions[: self.columns.numel()].view(self.columns.shape)
        positions = self._positions(self.columns, self.start[: self.num_rows, None], out=room)
        reading = Reading(step=0)
        hidden, logits = self.decoder(self.inputs, positions, num_slots_in_use=self.num_slots_in_use, reading=reading)
        return Judgement(logits[..., : self.vocab_size], {"teacher_hidden_states": hidden})

    def keep(self, block: torch.Tensor, count: torch.Tensor) -> None:
        if self.decoder.states is not None:
            self.decoder.states.keep(count)

    def hold(self) -> Callable[[], None]:
        return super().hold() if self.decoder.states is None else self.decoder.states.hold()

    def idle(self, num_tokens: int = 1) -> None:
        tokens = torch.zeros((1, num_tokens), dtype=torch.long, device=next(self.model.parameters()).device)
        # Modules that read a block token by token gather their weights for each: as often on every rank.
        states = self.decoder.states if hasattr(self, "decoder") else None  # it may have no row on this rank
        with nullcontext() if states is None else states.idle(tokens.shape):
            self.model(input_ids=tokens, use_cache=False)

    def _positions(self, columns: torch.Tensor, start: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Positions of the inputs of a block, of which the first is the last token kept: one before that which it predicts."""
        positions = torch.add(columns, start, out=out)
        return positions.clamp_(max=self.last_position) if self.may_run_over else positions
