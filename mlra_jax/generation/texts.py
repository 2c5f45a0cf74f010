"""Prompts of a JSON lines file, and where the text of several prompts goes."""

import json
from collections.abc import Iterator

from mlra_jax.data.tokenizers import StreamDecoder, Tokenizer
from mlra_jax.files import whole_file
from mlra_jax.storage.paths import AnyPath


def json_prompts(path: AnyPath, lines: Iterator[tuple[int, str]]) -> list[str]:
    """The prompts of numbered lines, each a JSON string or an object with a `prompt`.

    Raises ValueError naming the line that is neither.
    """
    prompts = []
    for number, line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(
                f'--prompt_file={path}, line {number}: give a JSON string or {{"prompt": "..."}}, '
                "not empty"
            )
        prompts.append(prompt)
    return prompts


class Printer:
    """Prints one prompt's text as it comes. Of several, each line with its prompt's number and
    all of a prompt before the next: the first that has not ended as it comes, later ones wait."""

    def __init__(self, prompts: list[str], tokenizer: Tokenizer):
        self.decoders = [StreamDecoder(tokenizer) for _ in prompts]
        self.many = len(prompts) > 1
        self.waiting, self.ended, self.shown = list(prompts), [False] * len(prompts), 0
        self._print()

    def push(self, row: int, token: int) -> None:
        self.waiting[row] += self.decoders[row].push(token)
        if row == self.shown:
            self._print()

    def end(self, row: int) -> None:
        """No more tokens of this row; may be said again."""
        if not self.ended[row]:
            self.ended[row] = True
            self.waiting[row] += self.decoders[row].flush()
            self._print()

    def close(self) -> None:
        """Prints what there is, also where rows have not ended."""
        for row in range(len(self.ended)):
            self.end(row)

    def _print(self) -> None:
        while self.shown < len(self.ended):
            row, ended = self.shown, self.ended[self.shown]
            if self.many:
                *whole, self.waiting[row] = self.waiting[row].split("\n")
                if ended and self.waiting[row]:
                    whole.append(self.waiting[row])
                for line in whole:
                    print(f"[{row}] {line}", flush=True)
            else:
                print(self.waiting[row], end="\n" if ended else "", flush=True)
                self.waiting[row] = ""
            if not ended:
                return
            self.shown += 1


class Recorder:
    """Writes a JSON line for each prompt when all have ended: `prompt`, `text`, `tokens`.

    Text and tokens are the new ones. The file appears whole or not at all.
    """

    def __init__(self, prompts: list[str], tokenizer: Tokenizer, path: AnyPath):
        self.prompts, self.tokenizer, self.path = prompts, tokenizer, path
        self.tokens: list[list[int]] = [[] for _ in prompts]

    def push(self, row: int, token: int) -> None:
        self.tokens[row].append(token)

    def end(self, row: int) -> None:
        pass

    def close(self) -> None:
        with whole_file(self.path) as file:
            for prompt, tokens in zip(self.prompts, self.tokens, strict=True):
                text = self.tokenizer.decode(tokens)
                file.write(json.dumps({"prompt": prompt, "text": text, "tokens": tokens}) + "\n")
