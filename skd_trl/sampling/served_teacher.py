"""A teacher behind a server, as a participant: it judges by what the server sends of each position.

The texts are kept on the host, one for each place. A round sends those of all rows together, and waits: the drafting before it
and the judging after it are what can be captured. Going back costs nothing, as the next request is the text that is kept.

Shapes: N places in use, G draft, k known tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import contextmanager

import torch

from .draft import Judgement
from .participants import Participant, Setting
from .prompts import Prompts
from .sampling_params import SamplingParams
from .top_judgement import Scores, TopJudgement


class Scorer(ABC):
    """Says how probable the tokens of texts are: a connection to a server. Texts are lists of token ids.

    Attributes:
        vocab_size (`int`, *optional*): how many ids the teacher has, if the server says.
        max_length (`int`): tokens that one may have.
        top_k (`int`): k.
    """

    vocab_size: int | None
    max_length: int
    top_k: int

    @abstractmethod
    def score(self, texts: Sequence[Sequence[int]], num_scored: int, keys: Sequence[int]) -> Scores:
        """What the teacher says of the last `num_scored` tokens of each text, on the CPU: (N, `num_scored`). With 0, of the token
        that would follow: (N, 1). Texts that continue one another have one key: the server that knows the beginning is asked."""


class ServedTeacher(Participant):
    """
    Args:
        scorer ([`Scorer`]): the connection.
        sampling ([`SamplingParams`], *optional*): how its draws are shaped.
        prompts ([`Prompts`], *optional*): what it reads instead of the student's prompts, one for each of them.
        vocab_size (`int`, *optional*): how many of its ids count; of the k most probable tokens, those beyond are left out.
    """

    def __init__(
        self,
        scorer: Scorer,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        *,
        prompts: Prompts | None = None,
        vocab_size: int | None = None,
    ):
        super().__init__(sampling)
        self.scorer, self.own_prompts = scorer, prompts
        size = scorer.vocab_size if vocab_size is None else vocab_size
        if size is None:
            raise ValueError("The server does not say how many ids its teacher has: give vocab_size, the student's.")
        self.num_ids: int = size
        self.vocab_size = size

    def check(self, name: str, prompts: Prompts, max_new_tokens: int) -> None:
        own = prompts if self.own_prompts is None else self.own_prompts
        own.check(name, len(prompts), self.num_ids)
        # vLLM generates a token after each text that it scores.
        if own.longest + max_new_tokens >= self.scorer.max_length:
            raise ValueError(
                f"The longest prompt has {own.longest} tokens; with max_new_tokens={max_new_tokens} and one more it needs "
                f"{own.longest + max_new_tokens + 1} positions, but the {name}'s server takes {self.scorer.max_length}. Shorten "
                "prompts or max_new_tokens, or start the server with a larger --max-model-len."
            )

    @contextmanager
    def session(self, prompts: Prompts, setting: Setting):
        own = prompts if self.own_prompts is None else self.own_prompts
        self.device = own.ids.device
        ids, width = own.ids.tolist(), own.ids.shape[1]
        self.prompts = [row[width - length :] for row, length in zip(ids, own.host_lengths, strict=True)]
        # By place: the text, and the prompt that it began with.
        self.texts: list[list[int]] = [[] for _ in range(setting.num_places)]
        self.keys = [-1] * setting.num_places
        self.max_new_tokens = setting.max_new_tokens
        yield

    def admit(self, places: list[int], prompts: list[int]) -> list:
        for place, prompt in zip(places, prompts, strict=True):
            self.texts[place], self.keys[place] = list(self.prompts[prompt]), prompt
        return []

    def move_row(self, source: int, target: int) -> None:
        self.texts[target], self.keys[target] = self.texts[source], self.keys[source]
        self.texts[source], self.keys[source] = [], -1

    @property
    def can_be_captured(self) -> bool:
        return False  # a server is asked

    def begin_round(self, rows: list[tuple[int, int]], num_rows: int, num_draft: int) -> None:
        super().begin_round(rows, num_rows, num_draft)
        live = {prompt for prompt, _ in rows}
        self.in_use = [place for place in range(num_rows) if self.keys[place] in live]

    def judge(self, proposals: torch.Tensor) -> Judgement:
        host_proposals, num_draft = proposals.tolist(), proposals.shape[1]
        is_drafted = bool(host_proposals) and host_proposals[0][0] >= 0
        texts, keys, beyond = [], [self.keys[place] for place in self.in_use], []
        for place, key in zip(self.in_use, keys, strict=True):
            # Proposals behind the last token of a response are not sent: the server may have no room for them.
            room = len(self.prompts[key]) + self.max_new_tokens - len(self.texts[place])
            texts.append(self.texts[place] + (host_proposals[place][:room] if is_drafted else []))
            beyond.append(max(num_draft - room, 0) if is_drafted else 0)
        # An unused place repeats the first answer, and a column behind the last token the one before it; nobody reads them.
        where = {place: index for index, place in enumerate(self.in_use)}
        row = torch.tensor([[where.get(place, 0)] for place in range(len(host_proposals))])
        column = (torch.arange(num_draft) + torch.tensor(beyond)[row]).clamp(max=num_draft - 1)
        self.judgement = self.ask(texts, num_draft if is_drafted else 0, keys, (row, column))
        return self.judgement

    def ask(
        self, texts: list[list[int]], num_scored: int, keys: list[int], index: tuple[torch.Tensor, torch.Tensor]
    ) -> Judgement:
        """What the server says of the last `num_scored` tokens of these texts, at the rows (N, 1) and columns (N, G) of `index`."""
        scores = self.scorer.score(texts, num_scored, keys).within(self.num_ids)
        placed = [values[index].to(self.device) for values in vars(scores).values()]
        return TopJudgement(Scores(*placed), self.num_ids)

    def keep(self, block: torch.Tensor, count: torch.Tensor) -> None:
        self.judgement.decide(block)
        for place, (tokens, num_kept) in enumerate(zip(block.tolist(), count.tolist(), strict=True)):
            # None where the row missed its nucleus, or ended before.
            self.texts[place] = self.texts[place] + tokens[:num_kept]
