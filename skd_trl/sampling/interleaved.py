"""Interleaved sampling: student and teacher write a text together (SKD, Xu et al., ICLR 2025, arXiv 2410.11325).

Algorithm 1 of the paper, for a whole batch and in blocks: drafting G tokens before the teacher looks changes the cost,
never the distribution of the text. This module knows no trainer and no configuration object.

Shapes: B prompts, N rows being written, P prompt, T response (at most `max_new_tokens`), G draft, V vocabulary, H hidden.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .acceptance import AcceptanceRule, Draft
from .compiled_step import CompiledStudent
from .draft_length import DraftLength, Round, Stopwatch
from .inputs import check_inputs
from .prefill import cost_of_forward
from .ragged_cache import RaggedDecoder
from .rollout import Rollout, Rows
from .sampling_params import SamplingParams, draw, draw_from_probs


# What the three uniform numbers of each response position decide.
STUDENT_DRAW, ACCEPT_COIN, TEACHER_DRAW = range(3)


@torch.no_grad()
def interleaved_sample(
    student: nn.Module,
    teacher: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    *,
    accept: AcceptanceRule,
    num_draft_tokens: int | str | DraftLength = 5,
    max_new_tokens: int,
    eos_token_ids: Iterable[int],
    pad_token_id: int,
    student_sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
    teacher_sampling: SamplingParams = SamplingParams(),  # noqa: B008
    generator: torch.Generator | None = None,
    uniforms: torch.Tensor | None = None,
    max_rows: int | None = None,
    vocab_size: int | None = None,
    agree: Callable[[int, int], tuple[int, int]] | None = None,
    compile_student: bool | CompiledStudent = False,
) -> Rollout:
    """Samples one response for each prompt, interleaving the two models.

    Until every row is finished:
      1. admit waiting prompts into free places of the cache and prefill both models, neighbours in length together;
      2. draft: the student proposes G tokens, one forward each;
      3. verify: the teacher runs once on G inputs, the last committed token and the first G-1 proposals;
      4. judge: the leading run of accepted proposals stands;
      5. replace the first rejected one by a draw from the teacher's row at that place (what follows it is dropped);
      6. commit; a row ends at an end-of-sequence token of either model or at `max_new_tokens`.
    A fully accepted block gets no extra token from the teacher: the share of teacher tokens would then depend on G.

    Args:
        student, teacher: causal language models of transformers (or PEFT models around one), unwrapped. They run in
            eval mode; each module's mode is put back afterwards.
        prompt_ids, prompt_mask (`torch.LongTensor` of shape `(B, P)`): left-padded prompts.
        accept ([`AcceptanceRule`]): such as `ACCEPTANCE_RULES["top_k"](k=25)`.
        num_draft_tokens (`int` or [`~skd_trl.sampling.draft_length.DraftLength`]): G, which changes the cost only. `"auto"` measures
            both models and chooses; an `AutoDraftLength` that is kept between calls measures once.
        eos_token_ids: any of these ends a row; give those of both models.
        student_sampling, teacher_sampling ([`SamplingParams`]): how the draws are shaped. Rules judge raw logits.
        generator (`torch.Generator`): where the noise comes from; the global one if `None`.
        uniforms (`torch.Tensor` of shape `(B, max_new_tokens, 3)`): the noise itself, in [0, 1), instead of `generator`:
            for each row and position the student's draw, the rule's coin and the teacher's draw. A row's text depends
            on its own noise only, neither on its neighbours nor on G.
        max_rows (`int`): how many rows are written at once; freed places are refilled. All of them if `None`.
        vocab_size (`int`): how many ids both models share, if their heads are padded to different widths.
        agree: for models whose forward is collective. Called at every round with (number of prefills, draft length); has to
            return the maximum over all ranks, which then run the same forwards: idle ones where they have nothing to do.
        compile_student (`bool` or [`~skd_trl.sampling.compiled_step.CompiledStudent`]): whether the student drafts in static shapes
            through `torch.compile`, for small students on GPUs; an object that is kept between calls compiles once.

    Raises:
        `ValueError`: for models, prompts or numbers that cannot work; the message names the row or the argument.
    """
    vocab_size = check_inputs(student, teacher, prompt_ids, prompt_mask, max_new_tokens, vocab_size, max_rows)
    draft_length = DraftLength.of(num_draft_tokens)
    rows = Rows(prompt_ids, prompt_mask, max_new_tokens, draft_length.longest, eos_token_ids)
    if uniforms is None:
        device = generator.device if generator is not None else prompt_ids.device
        uniforms = torch.rand((len(prompt_ids), max_new_tokens, 3), generator=generator, device=device)
    uniforms = uniforms.to(prompt_ids.device)
    num_places = min(max_rows or len(prompt_ids), len(prompt_ids))
    with ExitStack() as stack:
        decoders = []
        for model, takes_part, compiled in (
            (student, accept.drafts, CompiledStudent.of(compile_student)),
            (teacher, accept.judges, None),
        ):
            stack.enter_context(eval_mode(model))
            decoder = _Participant(model, num_places, rows.num_slots, vocab_size, compiled) if takes_part else None
            decoders.append(decoder)
        student_decoder, teacher_decoder = decoders
        if agree is None and len(prompt_ids) > 1:  # ranks would have to agree on one more forward
            _share_beginning(decoders, rows)
        while True:
            admitted = rows.admit(num_places)
            num_prefills, num_draft = len(admitted), _wish(draft_length, rows, accept)
            if agree is not None:
                num_prefills, num_draft = agree(num_prefills, num_draft)
            if num_draft == 0:
                return rows.rollout(prompt_ids, prompt_mask, pad_token_id, accept)
            _prefill(decoders, rows, admitted, num_prefills, is_collective=agree is not None)
            if not rows.live:
                _idle(decoders, num_draft)
                continue
            num_live, stopwatch = len(rows.live), Stopwatch(prompt_ids.device)
            noise = rows.at_block(uniforms, num_draft)  # (N, G, 3)
            stopwatch.mark()
            tokens, student_logits = _draft(student_decoder, rows, num_draft, student_sampling, noise, accept)
            stopwatch.mark()
            hidden, teacher_logits = _verify(teacher_decoder, rows, tokens)
            draft = Draft(
                tokens, student_logits, teacher_logits, student_sampling, teacher_sampling, noise[..., ACCEPT_COIN]
            )
            num_leading = _judge(accept, draft)
            block = _replace(accept, draft, num_leading, noise[..., TEACHER_DRAW])
            stopwatch.mark()
            freed = rows.commit(block, num_leading, draft, hidden, accept)
            for decoder in filter(None, decoders):
                decoder.close_gaps(freed)
            if accept.drafts and accept.judges:  # elsewhere there is nothing to learn from
                student_seconds, teacher_seconds = stopwatch.seconds()
                draft_length.observe(
                    Round(num_live, num_draft, student_seconds, teacher_seconds, rows.num_judged, rows.num_accepted)
                )


def _wish(draft_length: DraftLength, rows: Rows, accept: AcceptanceRule) -> int:
    """G for the next round: no longer than what any row still needs; 0 when there is nothing left to write."""
    if not rows.live:
        return 0
    if not accept.drafts:
        return 1
    return draft_length.choose(rows.remaining) if accept.judges else min(draft_length.unjudged, max(rows.remaining))


def _share_beginning(decoders: "list[_Participant | None]", rows: Rows) -> None:
    """Runs both models once over what all prompts begin with, if that pays for a forward of its own."""
    tokens = rows.shared_beginning()
    if (len(rows.prompt_ids) - 1) * tokens.shape[1] < cost_of_forward(tokens.device):
        return
    rows.num_shared = tokens.shape[1]
    positions = torch.arange(rows.num_shared, device=tokens.device)[None]
    for decoder in filter(None, decoders):
        decoder.prefill(tokens, positions, 0, rows.num_shared)
        decoder.decoder.spread_first_row(rows.num_shared)


def _prefill(
    decoders: "list[_Participant | None]",
    rows: Rows,
    admitted: list[tuple[int, torch.Tensor]],
    num_prefills: int,
    is_collective: bool,
) -> None:
    """Runs both models over all but the last token of newly admitted prompts, group by group, the longest last: ranks with
    fewer of `num_prefills` wait first, so that long groups meet."""
    for decoder in filter(None, decoders):
        for _ in range(num_prefills - len(admitted)):
            decoder.idle()
        for first_row, tokens in admitted:
            if tokens.numel() > 0:
                stop = rows.num_shared + tokens.shape[1]
                positions = torch.arange(rows.num_shared, stop, device=tokens.device).expand_as(tokens)
                decoder.prefill(tokens, positions, first_row, stop)
            elif is_collective:
                decoder.idle()


def _idle(decoders: "list[_Participant | None]", num_draft: int) -> None:
    """The forwards of one round, without rows: other ranks wait for them."""
    student_decoder, teacher_decoder = decoders
    for _ in range(num_draft if student_decoder is not None else 0):
        student_decoder.idle()
    if teacher_decoder is not None:
        teacher_decoder.idle()


def _draft(
    decoder: "_Participant | None", rows: Rows, num_draft: int, sampling: SamplingParams, noise, accept: AcceptanceRule
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The student's proposals (N, G), one forward each, without waiting for the device; its logits if the rule asks."""
    if decoder is None:
        return rows.last[rows.ids][:, None], None
    tokens, logits = [rows.last[rows.ids]], []
    for g in range(num_draft):
        row = decoder.step(tokens[-1][:, None], rows.positions(g, 1), rows.longest + g)
        tokens.append(draw(row[:, 0], sampling, noise[:, g, STUDENT_DRAW]))
        logits.append(row)
    return torch.stack(tokens[1:], dim=1), torch.cat(logits, dim=1) if accept.needs_student else None


def _verify(
    decoder: "_Participant | None", rows: Rows, tokens: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The teacher's hidden states (N, G, H) and logits (N, G, V) that judge the proposals, in one forward."""
    if decoder is None:
        return None, None
    last = rows.last[rows.ids][:, None]
    inputs = torch.cat([last, tokens[:, :-1]], dim=1)
    return decoder(inputs, rows.positions(0, inputs.shape[1]), num_slots_in_use=rows.longest + inputs.shape[1] - 1)


def _judge(accept: AcceptanceRule, draft: Draft) -> torch.Tensor:
    """How many leading proposals of each row are accepted (N,), 0 to G."""
    return accept(draft).long().cumprod(dim=-1).sum(dim=-1)


def _replace(accept: AcceptanceRule, draft: Draft, num_leading: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The block (N, G) with the first rejected proposal replaced; unchanged where all were accepted."""
    if not accept.judges:
        return draft.tokens
    column = num_leading.clamp(max=draft.tokens.shape[1] - 1)[:, None]
    at_column = draft.column(column)
    drawn = draw_from_probs(accept.replacement_probs(at_column).squeeze(1), noise.gather(1, column).squeeze(1))
    is_rejected = torch.arange(draft.tokens.shape[1], device=column.device) == num_leading[:, None]
    return torch.where(is_rejected, drawn[:, None], draft.tokens)


class _Participant:
    """A model with its cache, which answers with the shared part of the vocabulary and knows how to do nothing."""

    def __init__(
        self, model: nn.Module, num_rows: int, num_slots: int, vocab_size: int, compiled: CompiledStudent | None
    ):
        self.model, self.vocab_size, self.compiled = model, vocab_size, compiled
        self.decoder = (RaggedDecoder if compiled is None else compiled.decoder)(model, num_rows, num_slots)

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states (N, Q, H) and logits (N, Q, V): see [`RaggedDecoder`]."""
        hidden, logits = self.decoder(tokens, positions, **kwargs)
        return hidden, logits[..., : self.vocab_size]

    def prefill(self, tokens: torch.Tensor, positions: torch.Tensor, first_row: int, num_slots_in_use: int) -> None:
        """Fills the cache; makes no logits."""
        self.decoder(tokens, positions, first_row=first_row, num_slots_in_use=num_slots_in_use, without_logits=True)

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, num_slots_in_use: int) -> torch.Tensor:
        """Logits (N, 1, V) after one more token (N, 1) of each row."""
        if self.compiled is not None:
            return self.compiled.step(tokens, positions)[..., : self.vocab_size]
        return self(tokens, positions, num_slots_in_use=num_slots_in_use)[1]

    def idle(self) -> None:
        device = next(self.model.parameters()).device
        self.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)

    def close_gaps(self, moves: list[tuple[int, int]]) -> None:
        for source, target in moves:
            self.decoder.move_row(source, target)


@contextmanager
def eval_mode(model: nn.Module):
    """Eval mode for a while, with each module's own mode put back. In training mode dropout would act, and layers with
    gradient checkpointing would silently drop the cache."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
