"""Shows Hugging Face's docstring form as text: mkdocstrings passes its backticks, asterisks and [`Name`] through as they are."""

import re


def on_page_content(html, **_):
    html = re.sub(r"<code>([^<]*`[^<]*)</code>", lambda match: f"<code>{plain(match[1])}</code>", html)
    return re.sub(r"\[<code>([\w.~]+)</code>\]", lambda match: f"<code>{plain(match[1])}</code>", html)


def plain(text):
    text = text.replace("[`", "").replace("`]", "").replace("`", "").replace("*", "")
    return text.rsplit(".", 1)[-1] if text.startswith("~") else text
