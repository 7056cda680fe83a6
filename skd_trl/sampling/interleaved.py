"""Interleaved sampling: student and teacher write a response together (SKD, Xu et al., ICLR 2025, arXiv 2410.11325).

Algorithm 1 of the paper, for a whole batch and in blocks: drafting G tokens before the teacher looks changes the cost,
never the distribution of the responses. This module knows no trainer and no configuration object.

Shapes: B prompts, N rows being written, P prompt, T response (at most `max_new_tokens`), G draft, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .acceptance import AcceptanceRule
from .draft import DraftInSteps
from .draft_length import DraftLength, Round, Stopwatch
from .nucleus import CANDIDATES, CANDIDATES_ON_CPU, Nucleus
from .participants import LocalParticipant, Participant, Setting
from .prompts import Prompts
from .rollout import Rollout
from .rounds import Rounds, Signal, by_value
from .rows import Rows


# What the three uniform numbers of each response position decide.
STUDENT_DRAW, ACCEPT_COIN, TEACHER_DRAW = range(3)


@dataclass(frozen=True)
class Execution:
    """How responses are sampled. It changes the cost, never the responses (but for the rounding of other block shapes).

    Args:
        num_draft_tokens (`int`, `str` or [`~skd_trl.sampling.draft_length.DraftLength`], *optional*, defaults to `5`):
            G. `"auto"` measures both models and chooses; an `AutoDraftLength` that is kept between calls measures once.
        max_rows (`int`, *optional*):
            How many rows are written at once; freed places are refilled. All of them if `None`.
        agree (`Callable`, *optional*):
            For models whose forward is collective: takes whole numbers and returns their maxima over all ranks. It is called
            at every round with the numbers of prefills and the draft length. Ranks then run the same forwards, idle ones
            where they have nothing to do, also a rank without a single prompt.
        rounds ([`~skd_trl.sampling.rounds.Rounds`], *optional*):
            How rounds are run. On CUDA they are captured as graphs by default; give the same object to every call on the same pair,
            and what was captured is kept. `Rounds(capture=False)` captures nothing.
        observe (`Callable`, *optional*):
            Called after each round with two lists of whole numbers: the tokens written of each row, and the rows being written.
            For progress bars.
    """

    num_draft_tokens: int | str | DraftLength = 5
    max_rows: int | None = None
    agree: Callable[..., tuple[int, ...]] | None = None
    rounds: Rounds | None = None
    observe: Callable[[list[int], list[int]], None] | None = None


@torch.no_grad()
def interleaved_sample(
    student: nn.Module | Participant,
    teacher: nn.Module | Participant,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    *,
    accept: AcceptanceRule,
    max_new_tokens: int,
    eos_token_ids: Iterable[int] | int,
    noise: torch.Tensor | torch.Generator | None = None,
    execution: Execution = Execution(),  # noqa: B008 (frozen)
) -> Rollout:
    """Samples one response for each prompt, interleaving the two models.

    Until every row is finished:
      1. admit waiting prompts into free places, and prefill both models;
      2. draft: the student proposes G tokens, one forward each;
      3. judge: the teacher runs once on G inputs, the last kept token and the first G-1 proposals;
      4. accept the leading run of proposals that pass the rule;
      5. replace the first rejected one by a draw from the teacher's row at that place (what follows it is dropped);
      6. keep; a row ends at an end-of-sequence token of either model or at `max_new_tokens`.
    A fully accepted block gets no extra token from the teacher: the share of teacher tokens would then depend on G.

    Args:
        student, teacher ([`~skd_trl.sampling.participants.Participant`] or `nn.Module`):
            Who writes and who judges. A causal language model of transformers is taken as `LocalParticipant(model)`, which
            draws at temperature 1 from its whole vocabulary.
        prompt_ids, prompt_mask (`torch.LongTensor` of shape `(B, P)`):
            Left-padded prompts: the student's, and the teacher's unless it has its own.
        accept ([`AcceptanceRule`]):
            Such as `ACCEPTANCE_RULES["top_k"](k=25)`. Rules judge raw logits.
        max_new_tokens (`int`):
            T at most.
        eos_token_ids:
            Any of these ends a row; give those of both models.
        noise (`torch.Generator` or `torch.Tensor` of shape `(B, max_new_tokens, 3)`, *optional*):
            Where uniform numbers in [0, 1) come from (the global generator if `None`), or the numbers themselves: for each
            row and position the student's draw, the rule's coin and the teacher's draw. The response of a row depends on its
            own noise only, neither on its neighbours nor on G.
        execution ([`Execution`], *optional*):
            Draft length, rows at once, ranks.

    Returns:
        [`Rollout`].

    Raises:
        `ValueError`: for models, prompts or numbers that cannot work; the message names the row or the argument.
    """
    student, teacher = (x if isinstance(x, Participant) else LocalParticipant(x) for x in (student, teacher))
    prompts = Prompts(prompt_ids, prompt_mask)
    if not isinstance(accept, AcceptanceRule):
        raise ValueError(
            f"accept={accept!r} is no AcceptanceRule: give one, such as ACCEPTANCE_RULES['top_k'](k=25), or an object of your subclass."
        )
    eos_token_ids = [eos_token_ids] if isinstance(eos_token_ids, int) else [i for i in eos_token_ids if i is not None]
    _check(student, teacher, accept, prompts, max_new_tokens, execution.max_rows)
    num_uniforms = len(prompts), max_new_tokens, 3
    if not isinstance(noise, torch.Tensor):
        device = prompt_ids.device if noise is None else noise.device
        noise = torch.rand(num_uniforms, generator=noise, device=device)
    elif noise.shape != num_uniforms:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, but {len(prompts)} prompts with max_new_tokens={max_new_tokens} draw from three "
            f"numbers a token: pass torch.rand{num_uniforms}, or a generator."
        )
    draft_length = DraftLength.of(execution.num_draft_tokens)
    if not accept.judges:
        draft_length = DraftLength(draft_length.unjudged)
    if not accept.drafts:
        student, draft_length = Participant(student.sampling), DraftLength(1)
    if not accept.judges:
        teacher = Participant(teacher.sampling)
    num_places = min(execution.max_rows or len(prompts), len(prompts))
    agree = execution.agree or (lambda *numbers: numbers)
    device, rounds = prompt_ids.device, execution.rounds or Rounds()
    # Where no draw looks for a nucleus, none can miss it, and no block of one token goes back.
    may_miss = accept.drafts and student.sampling.is_cut or accept.judges and teacher.sampling.is_cut
    ladder = CANDIDATES_ON_CPU if device.type == "cpu" else CANDIDATES
    nucleus = Nucleus(ladder if may_miss else ())
    settings = (
        Setting(name, num_places, max_new_tokens, draft_length.longest, rounds, nucleus)
        for name in ("student", "teacher")
    )
    is_capturable = student.can_be_captured and teacher.can_be_captured and execution.agree is None
    with (
        rounds.session(device, is_capturable),
        student.session(prompts, next(settings)),
        teacher.session(prompts, next(settings)),
    ):
        rows = Rows(noise.to(device), num_places, draft_length.longest, eos_token_ids, rounds)
        while True:
            admitted = rows.admit(prompts)
            prefills = student.admit(*admitted), teacher.admit(*admitted)
            for move in rows.pack():
                student.move_row(*move)
                teacher.move_row(*move)
            num_draft = rounds.num_draft(draft_length.choose(rows.remaining), draft_length.few) if rows.live else 0
            num_of_student, num_of_teacher, num_draft = agree(len(prefills[0]), len(prefills[1]), num_draft)
            if num_draft == 0:
                return rows.rollout(prompts)
            student.prefill(prefills[0], num_of_student)
            teacher.prefill(prefills[1], num_of_teacher)
            if not rows.live:  # other ranks have some
                for _ in range(num_draft):
                    student.idle()
                teacher.idle(num_draft)
                continue
            shape = rows.live, rows.num_in_use, num_draft
            stopwatch, signal, is_warm_up = run_round(student, teacher, rows, accept, nucleus, shape)
            rows.keep_signal(signal)
            rows.read(num_draft, accept.drafts)  # the one wait for the device
            nucleus.observe(rows.num_missed)
            if execution.observe is not None:
                execution.observe(list(rows.host_written), [prompt for prompt, _ in rows.live])
            of_student, of_teacher, of_keep = stopwatch.seconds()
            counts = rows.num_judged, rows.num_accepted
            draft_length.observe(Round(len(shape[0]), num_draft, of_student, of_teacher, *counts, is_warm_up, of_keep))


def run_round(
    student: Participant,
    teacher: Participant,
    rows: Rows,
    accept: AcceptanceRule,
    nucleus: Nucleus,
    shape: tuple[list[tuple[int, int]], int, int],
) -> tuple[Stopwatch, Signal, bool]:
    """A round of `shape` (live rows, N, G), as it is or as the graph of an earlier one; see [`~skd_trl.sampling.rounds.Rounds.run`]."""
    _, num_rows, num_draft = shape

    def begin():
        for participant in (student, teacher):
            participant.begin_round(*shape)

    def play(stopwatch: Stopwatch) -> Signal:
        begin()
        return interleave_round(student, teacher, rows, accept, num_draft, nucleus, stopwatch)

    def hold() -> Callable[[], None]:
        held = [one.hold() for one in (rows, student, teacher)]

        def put_back() -> None:
            for one in held:
                one()

        return put_back

    begin()
    key = (
        num_rows, num_draft, rows.max_new_tokens, by_value(accept), nucleus.level, student.round_key(), teacher.round_key(),
    )  # fmt: skip
    return rows.rounds.run(key, play, rows.owner.device, hold)


def interleave_round(
    student: Participant,
    teacher: Participant,
    rows: Rows,
    accept: AcceptanceRule,
    num_draft: int,
    nucleus: Nucleus,
    stopwatch: Stopwatch,
) -> Signal:
    """Steps 2 to 6 for all rows in use: a function over fixed buffers, without a shape that depends on data and without a wait
    for the host. What it decided is in the buffers of `rows`; what it returns is what the teacher leaves for the loss."""
    nucleus.begin_round(keeps_drawn=accept.needs_student)
    last, columns, noise = rows.begin_block(num_draft)  # (N, 1), (N, G), (N, G, 3)
    stopwatch.mark()
    student.begin_block(last, columns)
    steps = [student.step(noise[:, g, STUDENT_DRAW]) for g in range(num_draft)]
    tokens = torch.stack([last.squeeze(1), *(tokens for tokens, _ in steps)], dim=1)
    inputs, proposals = tokens[:, :-1], tokens[:, 1:]
    stopwatch.mark()
    drawn = nucleus.take_drawn()
    teacher.begin_block(inputs, columns)
    judgement = teacher.judge(proposals)
    draft = DraftInSteps(
        steps, accept.needs_student, tokens=proposals, judgement=judgement, student_sampling=student.sampling,
        teacher_sampling=teacher.sampling, coins=noise[..., ACCEPT_COIN], nucleus=nucleus, is_drafted=accept.drafts,
        drawn=drawn if len(drawn) == num_draft else (),
    )  # fmt: skip
    accepted = accept(draft).bool()
    column = rows.first_rejected(accepted)
    replacement = accept.replacement(draft.column(column), noise[..., TEACHER_DRAW].gather(1, column).squeeze(1))
    block = torch.where(accepted, proposals, replacement[:, None])  # what follows the first rejected token is dropped
    stopwatch.mark()
    count = rows.write(block, accepted, draft, nucleus.fitted(len(block)))
    student.keep(block, count)
    teacher.keep(block, count)
    stopwatch.mark()
    return judgement.signal


def _check(
    student: Participant,
    teacher: Participant,
    accept: AcceptanceRule,
    prompts: Prompts,
    max_new_tokens: int,
    max_rows: int | None,
) -> None:
    if accept.drafts and type(student).step is Participant.step:
        raise ValueError(
            f"The student, a {type(student).__name__}, has no `step`, so it proposes nothing, and {accept!r} judges proposals. Write the method, or "
            "give accept=ACCEPTANCE_RULES['never']()."
        )
    if accept.judges and type(teacher).judge is Participant.judge:
        raise ValueError(
            f"The teacher, a {type(teacher).__name__}, has no `judge`, and {accept!r} asks it. Write the method, or give "
            "accept=ACCEPTANCE_RULES['always']()."
        )
    for name, value in (("max_new_tokens", max_new_tokens), ("max_rows", 1 if max_rows is None else max_rows)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    for name, participant in (("student", student), ("teacher", teacher)):
        participant.check(name, prompts, max_new_tokens)
    sizes = student.vocab_size, teacher.vocab_size
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"The student's vocabulary has {sizes[0]} entries and the teacher's {sizes[1]}. If both use the same tokenizer and "
            "their heads are only padded differently, give both participants vocab_size, the number of ids they share."
        )
