"""From the engine's token ids to what callers read: text, logprobs, finish reasons.

One ``OutputProcessor`` for each request, on the side of the text. Knows the
tokenizer and no device, no socket and no scheduling.

Invariants: the pieces of a completion, joined, are its text; no piece ends in
half a character or holds what may still become a stop string; a completion
finishes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from midspan.decoding.sampling_params import SamplingParams
from midspan.engine.messages import PromptReport, SequenceEvent, TokenScores
from midspan.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from midspan.engine.request_validation import PreparedRequest
from midspan.text.incremental_detokenizer import IncrementalDetokenizer
from midspan.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What one or more events came to.

    Attributes:
        output: the increment, or None when there is nothing new for the caller.
        stopped: indexes of sequences that a stop string ended; the engine must abort them.
    """

    output: RequestOutput | None
    stopped: tuple[int, ...]


class _Completion:
    """One sequence's text so far."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self.index = index
        self.finished = False
        self._params = params
        self._tokenizer = tokenizer
        self._cumulative: float | None = None if params.logprobs is None else 0.0
        self._detokenizer: IncrementalDetokenizer | None = None
        if params.detokenize:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer,
                stop=tuple(params.stop),
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
                continues_text=True,
            )

    def advance(self, event: SequenceEvent) -> CompletionOutput:
        """Take new tokens; a stop string among them ends the completion and drops what follows."""
        taken: list[int] = []
        text: list[str] = []
        stop: str | None = None
        ended_by_token = event.finish_reason == "stop" and not self._params.include_stop_str_in_output
        for place, token in enumerate(event.token_ids):
            taken.append(token)
            if ended_by_token and place == len(event.token_ids) - 1:
                break
            stop = self._push(token, text)
            if stop is not None:
                break
        finish_reason = event.finish_reason if stop is None else "stop"
        self.finished = finish_reason is not None
        if self.finished and stop is None and self._detokenizer is not None:
            text.append(self._detokenizer.finish())
        scores = event.scores[: len(taken)] if event.scores is not None else None
        return CompletionOutput(
            index=self.index,
            text="".join(text),
            token_ids=taken,
            cumulative_logprob=self._accumulate(scores),
            logprobs=None if scores is None else [candidates(score, self._tokenizer) for score in scores],
            finish_reason=finish_reason,
            stop_reason=event.stop_reason if stop is None else stop,
            error=event.error,
        )

    def _push(self, token: int, text: list[str]) -> str | None:
        if self._detokenizer is None:
            return None
        piece = self._detokenizer.push(token)
        text.append(piece.text)
        return piece.stop

    def _accumulate(self, scores: Sequence[TokenScores] | None) -> float | None:
        if self._cumulative is not None:
            self._cumulative += sum(score.logprob for score in scores or ())
        return self._cumulative


class OutputProcessor:
    """Makes the outputs of one request."""

    def __init__(
        self, request_id: str, prepared: PreparedRequest, tokenizer: Tokenizer, *, arrival_time: float
    ) -> None:
        self.metrics = RequestMetrics(arrival_time=arrival_time)
        self._request_id = request_id
        self._prepared = prepared
        self._tokenizer = tokenizer
        self._completions = [_Completion(index, prepared.params, tokenizer) for index in range(prepared.params.n)]
        self._cached_tokens = 0
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def finished(self) -> bool:
        """Whether all completions are."""
        return all(completion.finished for completion in self._completions)

    def is_finished(self, index: int) -> bool:
        """Whether one completion is."""
        return self._completions[index].finished

    def process(self, events: Sequence[SequenceEvent], now: float) -> Progress:
        """Take events of this request, in order.

        Args:
            events: each of a sequence of this request; what comes after a sequence's end is ignored.
            now: seconds of the monotonic clock.
        """
        outputs: list[CompletionOutput] = []
        stopped: list[int] = []
        for event in events:
            completion = self._completions[event.index]
            if completion.finished:
                continue
            if event.prompt is not None:
                self._take_prompt(event.prompt)
            output = completion.advance(event)
            if output.finish_reason is not None and event.finish_reason is None:
                stopped.append(event.index)
            outputs.append(output)
            if output.token_ids and self.metrics.first_token_time is None:
                self.metrics.first_token_time = now
        if not outputs:
            return Progress(output=None, stopped=())
        if self.finished:
            self.metrics.finished_time = now
        return Progress(output=self._output(outputs), stopped=tuple(stopped))

    def _take_prompt(self, report: PromptReport) -> None:
        if self.metrics.first_scheduled_time is None:
            self.metrics.first_scheduled_time = report.scheduled_time
            self._cached_tokens = report.cached_tokens
        if report.scores is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = [None, *(candidates(score, self._tokenizer) for score in report.scores)]

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prepared.prompt,
            prompt_token_ids=self._prepared.prompt_ids,
            outputs=outputs,
            finished=self.finished,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._cached_tokens,
            metrics=self.metrics,
        )


def candidates(score: TokenScores, tokenizer: Tokenizer) -> TokenLogprobs:
    """The candidates at one place, the token that stands there first."""
    found: TokenLogprobs = {
        score.token_id: Logprob(
            logprob=score.logprob, rank=score.rank, decoded_token=tokenizer.token_text(score.token_id)
        )
    }
    for place, (token, logprob) in enumerate(zip(score.top_ids, score.top, strict=True)):
        if token not in found:
            found[token] = Logprob(logprob=logprob, rank=place + 1, decoded_token=tokenizer.token_text(token))
    return found


def merge(whole: RequestOutput | None, piece: RequestOutput) -> RequestOutput:
    """Join an increment to what came before, for callers that want the whole."""
    if whole is None:
        whole = RequestOutput(
            request_id=piece.request_id,
            prompt=piece.prompt,
            prompt_token_ids=piece.prompt_token_ids,
            outputs=[],
            finished=False,
        )
    known = {output.index: output for output in whole.outputs}
    for news in piece.outputs:
        output = known.get(news.index)
        if output is None:
            output = known[news.index] = CompletionOutput(index=news.index)
        output.text += news.text
        output.token_ids.extend(news.token_ids)
        output.cumulative_logprob = news.cumulative_logprob
        if news.logprobs is not None:
            output.logprobs = [*(output.logprobs or ()), *news.logprobs]
        output.finish_reason, output.stop_reason, output.error = news.finish_reason, news.stop_reason, news.error
    whole.outputs = [known[index] for index in sorted(known)]
    whole.finished = piece.finished
    whole.prompt_logprobs = piece.prompt_logprobs
    whole.num_cached_tokens = piece.num_cached_tokens
    whole.metrics = piece.metrics
    return whole
