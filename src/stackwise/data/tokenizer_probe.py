"""A program that loads a tokenizer.json as the library does, where nothing is lost when that ends badly.

Read by its path, in a process of its own: `python -I tokenizer_probe.py < tokenizer.json`. It may use a bounded amount
of memory, time and files, encodes texts on which slow patterns show themselves, and ends with 0 when all went well. It
imports nothing of this project.
"""

import json
import os
import resource
import sys

MEMORY = 2**30
MEMORY_PER_BYTE = 40
SECONDS = 30
FILES = 32
RUN = 2000
"""Characters of a run of one character."""


def main() -> int:
    """Load what standard input holds and use it; what is wrong is written to standard output."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    data = sys.stdin.buffer.read()
    memory = MEMORY + MEMORY_PER_BYTE * len(data)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    content = data.decode("utf-8")
    from tokenizers import Tokenizer

    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    library = Tokenizer.from_str(content)
    size = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    for text in probes(content):
        ids = library.encode(text, add_special_tokens=True).ids
        if len(ids) > 100 * len(text) + 1000:
            sys.stdout.write(f"{len(text)} characters become {len(ids)} tokens")
            return 1
        if ids and max(ids) >= size:
            sys.stdout.write(f"gives the id {max(ids)} in a vocabulary of {size}")
            return 1
        library.decode(ids)
    return 0


def probes(content: str) -> list[str]:
    """Ordinary text, and long runs of each character that a pattern names."""
    plain = "The quick brown fox, 12345 times;\n\tüñï — 漢字かな 🙂\r\n  don't    stop...\u0000\u200b"
    named = {char for text in patterns(json.loads(content)) for char in text}
    runs = sorted({*"a A0.,!-'\n\t_", *sorted(named)[:64]})
    return ["", plain, plain * 50, *(char * RUN + end for char in runs for end in ("", "!\x01"))]


def patterns(part: object) -> list[str]:
    """All regular expressions of a definition."""
    if isinstance(part, list):
        return [text for item in part if isinstance(item, dict) for text in patterns(item)]
    if not isinstance(part, dict):
        return []
    found = [part["Regex"]] if isinstance(part.get("Regex"), str) else []
    return found + [text for name, item in part.items() if name != "vocab" for text in patterns(item)]


if __name__ == "__main__":
    sys.exit(main())
