"""The tokenizer of a GGUF file, made again from its vocabulary, merges and scores.

    tokenizer.ggml.model   gpt2: BPE of bytes; llama: BPE of characters, whose merges follow from scores
    tokenizer.ggml.pre     how a text is split before merges, of gpt2

Imports extras.
"""

from typing import Any

from ..errors import ArgumentError
from ..extras import require

#: Of `tokenizer.ggml.token_type`.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
#: Words, punctuation and white space, as Llama 3 and Qwen 2 split them; {} is how many digits stay together.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: Other names of the same rules.
SAME_AS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
#: What begins each word in a vocabulary of characters.
WORD_MARK = "\u2581"


class GGUFVocabulary:
    """What a GGUF file says about its tokens.

    metadata : the file's fields by name
    where : what errors call the file
    """

    def __init__(self, metadata: dict[str, Any], where: str) -> None:
        self._metadata, self.where = metadata, where
        self.kind = self._get("model", "none")
        if self.kind not in ("gpt2", "llama"):
            raise ArgumentError(f"{where}: the tokenizer is {self.kind!r:.40}; gpt2 and llama are supported")
        pre = self._get("pre", "none") if self.kind == "gpt2" else "none"
        self.pre = SAME_AS.get(pre, pre)
        if self.kind == "gpt2" and self.pre not in PRE_TOKENIZERS:
            raise ArgumentError(
                f"{where}: texts are split as {pre!r:.40}; {', '.join(PRE_TOKENIZERS)} are supported"
            )
        self.tokens: list[str] = self._list("tokens", str)
        self.types: list[int] = self._list("token_type", int) or [1] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise ArgumentError(f"{where}: {len(self.tokens)} tokens have {len(self.types)} types")

    def _get(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{name}", default)

    def _list(self, name: str, *kinds: type) -> list[Any]:
        values = self._get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, kinds) for value in values):
            raise ArgumentError(f"{self.where}: tokenizer.ggml.{name} is no list of {kinds[0].__name__}")
        return values

    @property
    def begin_ids(self) -> list[int]:
        """What stands before every prompt."""
        adds = self._get("add_bos_token", self.kind == "llama" or self.pre == "llama-bpe")
        begin = self._get("bos_token_id")
        return [begin] if adds and begin is not None else []

    def token(self, name: str) -> str | None:
        """The text of a token that has a role: bos, eos, unknown."""
        id = self._get(f"{name}_token_id")
        return self.tokens[id] if isinstance(id, int) and 0 <= id < len(self.tokens) else None

    def tokenizer(self) -> Any:
        """A tokenizers.Tokenizer.  Raises: ArgumentError; ImportError that names the extra."""
        tokenizers = require("tokenizers", "gguf")
        try:
            made = self._bytes(tokenizers) if self.kind == "gpt2" else self._characters(tokenizers)
        except ArgumentError:
            raise
        except Exception as error:  # the package raises no other type
            raise ArgumentError(f"{self.where}: its vocabulary makes no tokenizer: {error}") from None
        added = [
            tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
        made.add_tokens([token for token in added if not token.special])
        made.add_special_tokens([token for token in added if token.special])
        return made

    def _bytes(self, tokenizers: Any) -> Any:
        pre, models = tokenizers.pre_tokenizers, tokenizers.models
        merges = [tuple(merge.split(" ")) for merge in self._list("merges", str)]
        vocabulary = {token: id for id, token in enumerate(self.tokens)}
        # A word that is a token stays one, whatever its merges would make of it.
        made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=self.pre == "llama-bpe"))
        if self.pre in ("llama-bpe", "qwen2"):
            words = tokenizers.Regex(WORDS.format("{1,3}" if self.pre == "llama-bpe" else ""))
            steps = [pre.Split(words, "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
        else:
            digits = [pre.Digits(individual_digits=True)] if self.pre == "smollm" else []
            steps = [*digits, pre.ByteLevel(add_prefix_space=False)]
        if self.pre == "qwen2":
            made.normalizer = tokenizers.normalizers.NFC()
        made.pre_tokenizer = pre.Sequence(steps)
        made.decoder = tokenizers.decoders.ByteLevel()
        return made

    def _characters(self, tokenizers: Any) -> Any:
        """SentencePiece's BPE: of two neighbours, those are merged first whose union has the best score."""
        scores = [float(score) for score in self._list("scores", float, int)]
        if len(scores) != len(self.tokens):
            raise ArgumentError(f"{self.where}: {len(self.tokens)} tokens have {len(scores)} scores")
        vocabulary = {token: id for id, token in enumerate(self.tokens)}
        merges = []
        for token, id in vocabulary.items():
            pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
            pairs = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
            pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
            merges += [(-scores[id], id, pair) for pair in pairs]
        merges.sort(key=lambda merge: merge[:2])
        normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
        made = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocabulary,
                [pair for _, _, pair in merges],
                unk_token=self.token("unknown"),
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        marks = normalizers.Replace(" ", WORD_MARK)
        has_space = self._get("add_space_prefix", True)
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend(WORD_MARK), marks] if has_space else [marks]
        )
        strip = [decoders.Strip(" ", 1, 0)] if has_space else []
        made.decoder = decoders.Sequence(
            [decoders.Replace(WORD_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        return made
