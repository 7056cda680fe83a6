"""A teacher's server without the server: scores and hidden states of a model in this process, from uncached forwards."""

import torch

from skd_trl.loss.lm_head import backbone
from skd_trl.sampling.served_hidden_states import HiddenStatesScorer
from skd_trl.sampling.top_judgement import Scores


class LocalScorer(HiddenStatesScorer):
    def __init__(self, model, top_k: int, vocab_size: int):
        self.model, self.top_k, self.vocab_size, self.max_length = model, top_k, vocab_size, 512
        self.requests: list[list[list[int]]] = []

    @torch.no_grad()
    def score(self, texts, num_scored, keys) -> Scores:
        self.requests.append([list(text) for text in texts])
        rows = [self._of_text(text, num_scored) for text in texts]
        return Scores(*(torch.stack(values) for values in zip(*rows, strict=True)))

    @torch.no_grad()
    def hidden_states(self, texts, num_scored, keys) -> torch.Tensor:
        self.requests.append([list(text) for text in texts])
        rows = [backbone(self.model)(input_ids=torch.tensor([text]), use_cache=False)[0][0] for text in texts]
        return torch.stack([row[-1:] if num_scored == 0 else row[-1 - num_scored : -1] for row in rows])

    def _of_text(self, text, num_scored):
        logits = self.model(input_ids=torch.tensor([text]), use_cache=False).logits[0, :, : self.vocab_size].float()
        log_probs = logits.log_softmax(-1)
        asked = log_probs[-1:] if num_scored == 0 else log_probs[-1 - num_scored : -1]
        ids = asked.topk(self.top_k, dim=-1).indices.sort(dim=-1).values
        if num_scored == 0:
            return ids, asked.gather(-1, ids), torch.full((1,), -torch.inf), torch.full((1,), -1)
        own = asked.gather(-1, torch.tensor(text[-num_scored:])[:, None])
        return ids, asked.gather(-1, ids), own.squeeze(-1), (asked > own).sum(-1)
