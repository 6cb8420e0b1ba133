"""Texts that look like keys: a configuration names a secret's file, never the secret."""

from __future__ import annotations

import re

# Keys that are recognised by their own shape.
KEYS = {
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an OpenAI or Anthropic key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}|\bya29\.[0-9A-Za-z_-]{20,}",
    "a Weights & Biases key": (
        r"\bwandb_v1_[A-Za-z0-9_]{20,}|(?i:wandb_api_key)[\"']?\s*[:=]\s*[\"']?[0-9a-f]{40}\b"
    ),
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.",
    "a password in an address": r"://[^/\s:@$]+:[^/\s:@$]{3,}@",
}
# A literal that is given to a name such as password. Paths, variables and placeholders, which begin
# with / ~ . $ < or {, are not literals.
NAMED = re.compile(
    r"(?i)\b[\w-]*(?:password|passwd|secret|token|api[_-]?key|access[_-]?key|credentials?)"
    r"[\"']?\s*[:=]\s*[\"']?"
    r"(?P<value>[A-Za-z0-9+_-][A-Za-z0-9+/=_.!@#%^&*-]{7,})"
)
HARMLESS = re.compile(
    r"(?i)disabled|required|optional|credentials_token|service_account|[\w./-]*\.(?:pem|txt|json|key|token|yaml)"
)


def known_key(text: str) -> str | None:
    """The kind of key whose shape occurs in ``text``, or None."""
    return next((kind for kind, pattern in KEYS.items() if re.search(pattern, text)), None)


def looks_secret(text: str) -> str | None:
    """The kind of secret in ``text``: a key, or a literal of a name such as ``password=``; or None.

    The answer never repeats the secret.

    >>> looks_secret("WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567")
    'a Weights & Biases key'
    >>> looks_secret("auth_token: ~/.ray/auth_token"), looks_secret("token=$TOKEN")
    (None, None)
    """
    if kind := known_key(text):
        return kind
    for match in NAMED.finditer(text):
        if not HARMLESS.fullmatch(match["value"]):
            return "a literal password, token or key"
    return None
