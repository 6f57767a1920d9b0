"""Texts on which tokenizers that differ anywhere will differ: scripts, emoji, code, white space, digits."""

from __future__ import annotations

from collections.abc import Iterable

_SCRIPTS = (
    "The patient's BP was 120/80 mmHg; she'd taken 2.5 mg of warfarin, hadn't she? I'LL CHECK. We'Ve DON'T",
    "Der Müßiggänger aß 3½ Öltörtchen – naïve façade, Ångström, œuvre, ĲSSEL, Łódź, šťastný, ığdır İstanbul",
    "Пациент жалуется на одышку и боль в груди в течение 3 дней; t=38,5°C. Ґудзик, ѐлка, щёчка",
    "Ο ασθενής παρουσιάζει δύσπνοια και πυρετό, ΆΈΉΊΌΎΏ ᾳῃῳ",
    "المريض يعاني من ألم في الصدر منذ ٣ أيام، مُشَكَّلَة، پچژگ",
    "החולה מתלונן על כאבים בחזה, בְּרֵאשִׁית",
    "रोगी को सीने में दर्द है, क्षत्रिय ज्ञान १२३; রোগীর বুকে ব্যথা ৪৫৬; நோயாளிக்கு மார்பு வலி; రోగికి నొప్పి",
    "ผู้ป่วยมีอาการเจ็บหน้าอก ๑๒๓; អ្នកជំងឺឈឺទ្រូង; လူနာရင်ဘတ်အောင့်",
    "患者胸痛三天,血压120/80。患者は胸痛を訴え、ﾊﾝｶｸとカタカナ。환자는 흉통을 호소합니다. 각 ㄱㅏ",
    "ავადმყოფი Հիվանդ ᎠᎡᎢ ትግርኛ ᠮᠣᠩᠭᠣᠯ བོད་ཡིག ߒߞߏ 𐎀𐎁 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟏𝟐𝟑",
    "Ne\u0301e, a\u0308 o\u0302\u0323, e\u0301\u0301, \u1e9b\u0323 ﬁ ﬂ ﬃ Ⅷ ① ½ ² ₃ ℃ Ω µ μ ſ",
)
_EMOJI = (
    "🚑 😀😀 👩‍⚕️ 👨🏽‍🔬 🏳️‍🌈 🇩🇪🇫🇷 ❤️‍🩹 1️⃣ ☎ ☎️ 🫀🧠",
    "a😀b 😀 c  😀\n😀\t🦙.cpp ✅✔️ …‥․",
)
_CODE = (
    "def dose(kg: float) -> float:\n    return kg * 0.1  # mg/kg\n\n\n",
    "class A:\n\tx = {'a': [1, 2], \"b\": None}\n\n    def f(self):\n        pass\n",
    '<div class="x">&amp;<br/></div>\n```json\n{"k": [1e-9, -0.5, true]}\n```\n| a | b |\n|---|---|\n',
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\temp\\x $HOME ~/.x",
    "^_^ `x` **b** __i__ ~~s~~ $x^2_i$",
    "===== ------ ______ ****** ###### !!!! ???? .... ,,, ;;; ::: ''' \"\"\" ``` ((([[[{{{}}}]]])))",
    "a+b-c*d/e%f&g|h!i=j<k>l, a->b, a=>b, a!=b, a<=b, x++; y--; **kwargs, //, /* */",
)
_WHITESPACE = (
    " ", "  ", "   ", "\n", "\n\n", "\n\n\n", "\t", "\t\t", " \n", "\n ", " \n \n  \n   \n", "\r\n",
    "\r\n\r\n", "\r", "a b", " a", "  a", "   a", "a ", "a  ", "a   b    c", "\ta", "a\t b \t c",
    "a\n b", "a \nb", "a\n\n  b\n\n\n",
    "a\u00a0b \u00a0 c\u2003d\u3000e\u200bf\u2028g\ufeffh", "\u00a0", "\u3000\u3000",
    "x\u000bx\u000cx\u0085x",
)  # fmt: skip
_DIGITS = (
    "0 1 12 123 1234 12345 123456 1234567 12345678 123456789012345678901234567890",
    "3.14159 1,234,567.89 1e10 -7 +7 007 1st 2nd 3rd 12:34:56 2024-02-29 50% 5mg 10mL",
    "1/2 ¼ ٣٤ १२ ⅔ x2 H2O CO₂",
)
_ODD = (
    "a",
    "",
    "é",
    "'",
    "'s",
    "'S 'T 're 'RE 'Ll 'D it's IT'S it’s",
    "<", "<|", "<|im", "<|im_start", "|>", "</", "<think", "</think", "<s", "<s >", "<unk", "< think>",
    "▁", "▁a ▁▁b",
    "Ġ", "Ċ", "<0x0A>", "[PAD0]", "\u0001\u0002\u001f\u007f", "\ue000\uf8ff", "\U0010ffff", "\ufffd",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "HbA1c 8.2 %, eGFR 45 mL/min/1.73 m², Na⁺ 128 mmol/L, SpO2≥94%, β-blocker, α1-antitrypsin, q.d., b.i.d.",
)  # fmt: skip
STRESS_TEXTS = (*_SCRIPTS, *_EMOJI, *_CODE, *_WHITESPACE, *_DIGITS, *_ODD)


def control_token_texts(tokens: Iterable[str]) -> list[str]:
    """Texts in which each control token stands alone, between letters, between spaces and next to itself."""
    texts = []
    for token in tokens:
        texts += [token, f"a{token}b", f"a {token} b", f"\n{token}\n\n{token}{token} c"]
    return texts
