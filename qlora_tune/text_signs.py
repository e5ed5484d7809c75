"""What defects of text look like: the patterns that the quality report searches for."""

from __future__ import annotations

import re

_ROLE_MARK = r"(?:Human|User|Assistant|System|Instruction|Input|Output|Response)"
MARKERS = re.compile(
    r"<\|[A-Za-z_]{2,40}\|>|<｜[^<>｜\n]{1,40}｜>|<\|turn>|<turn\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?s>"
    r"|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<(?:bos|eos|pad|unk)>|</?tool_call>"
    rf"|^###[ \t]{{0,4}}{_ROLE_MARK}[ \t]{{0,4}}(?::|$)|^USER:.*\n{{1,4}}ASSISTANT:|^Human:.*\n{{1,4}}Assistant:",
    re.M,
)
# Zero-width space, word joiner, byte-order mark and the like within text, and the marks that turn the writing
# direction. Joiners (U+200C, U+200D) belong to scripts and emoji, so they are looked at between Latin letters only; a
# zero-width space parts the words of Thai, Lao, Burmese and Khmer; tag characters spell flags.
_INVISIBLE = (
    "[\u2060-\u2064\ufeff\u00ad\u034f\u3164\u202d\u202e]"
    "|(?<![\u0e00-\u109f\u1780-\u17ff])\u200b(?![\u0e00-\u109f\u1780-\u17ff])"
    "|(?<=[A-Za-z\u00c0-\u024f])[\u115f\u180e\u200c\u200d]+"
    "|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0001-\U000e007f]+"
)
INVISIBLE = re.compile(_INVISIBLE)
# Marks of direction belong to text that holds Hebrew or Arabic; only overrides turn letters around there.
INVISIBLE_LEFT_TO_RIGHT = re.compile(_INVISIBLE + "|[\u200e\u200f\u061c\u202a-\u202c\u2066-\u2069]")
RIGHT_TO_LEFT = re.compile("[\u0590-\u060b\u060d-\u061b\u061d-\u08ff\ufb1d-\ufdcf\ufe70-\ufefc]")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")
PLACEHOLDER_ANSWER = re.compile(
    r"\W*(none|n\.?/?a|null|nil|nan|undefined|todo|tbd|to be (?:done|added|determined)|xxx+|lorem ipsum.*"
    r"|(?:this is a )?placeholder|no (?:output|answer|response)|no\s?(?:in|out)put|not (?:available|applicable)"
    r"|example (?:output|answer)|(?:your|insert) (?:answer|text|response|output) here"
    r"|(?:answer|output|response) goes here)\W*"
    r"|[<\[(](?:output|answer|response|empty|removed|deleted)[>\])]|[\s.…?*_-]+",
    re.I | re.S,
)
_SLOT = (
    r"(?:(?:your|user|first|last|full|customer|client|company|product|recipient|sender|employee|insert|enter)[ _-]?)?"
    r"(?:name|user|username|company|product|customer|client|recipient|date|city|country|address|email|phone|title|author"
    r"|topic|subject|question|answer|instruction|context|text|input|output|placeholder|position|job title)"
    r"(?:[ _-]here)?"
)
UNFILLED = re.compile(
    r"\{\{\{?[\s#/^>&]*[A-Za-z_][\w .-]{0,40}\}\}|\$\{[a-z_]\w{0,40}\}|[\[<(](?:insert|enter) [a-z ,'_/]{2,40}[\]>)]"
    rf"|(?<![\w\\}}{{$]){{{_SLOT}}}(?!}})|%\({_SLOT}\)s|<%=?\s*\w[\w. ]{{0,40}}%>|{{%-?\s*\w[\w. ]{{0,40}}-?%}}"
    rf"|[\[<]{{2}}{_SLOT}[\]>]{{2}}|\[your [a-z ,'_/]{{2,40}}\]|<your [a-z _]{{2,40}}>|@@\w{{2,40}}@@"
    rf"|\[{_SLOT}\](?!\()|<(?-i:NAME|USER|DATE|CITY|COMPANY|EMAIL|ADDRESS|PHONE|TITLE)>"
    rf"|(?<!\w)__(?:{_SLOT})__(?!\w)|\${_SLOT}\$",
    re.I,
)
_ENTITY = (
    r"&(?:nbsp|amp|lt|gt|quot|apos|[lr][sd]quo|[mn]dash|hellip|copy|reg|trade|bull|middot|deg|euro|pound|times"
    r"|[aeiouncy](?:acute|grave|uml|circ|cedil|tilde)|#\d+|#x[0-9a-f]+);"
)
HTML = re.compile(
    r"</(?:p|div|span|a|b|i|u|li|ul|ol|td|th|tr|table|h[1-6]|strong|em|font|body|html|head|center|sup|sub|pre|code"
    r"|section|article|blockquote|script|style|small|title|label|button|form|header|footer|nav)\s*>|<[bh]r\s*/?>|<!--"
    r"|<(?:p|td|tr|li|ul|ol|div|span|table|center|blockquote|h[1-6])(?:\s[^<>]*)?>|<(?:img|a|font|script)\s[^<>]*>"
    rf"|{_ENTITY}",
    re.I,
)
ABOUT_CODE = re.compile(
    r"\b(?:x?html5?|xml|css|svg|javascript|typescript|jsx|react|vue|angular|jinja|django|php|markup|tags?"
    r"|web ?(?:page|site|scrap\w+)s?|crawl\w*)\b|```|</",
    re.I,
)
_MODEL = r"(?:(?:virtual )?(?:ai|artificial intelligence)|(?:large )?language model|chat ?bot)"
BOILERPLATE = re.compile(
    rf"\bas an? {_MODEL}(?:,| (?:powered )?(?:language )?(?:model|assistant|chat ?bot|program)\b| developed| trained"
    r"| i\b)"
    rf"|\bi(?:'|’)?(?: a)?m (?:just |only )?an? {_MODEL}\b"
    r"|\bmy (?:knowledge|training)(?: data)? cut-?off\b|作为(?:一个|一名)?(?:人工智能|AI|大?语言模型)",
    re.I,
)
_SORRY = (
    r"(?:i(?:'|’)?(?: a)?m (?:very |really |so )?(?:sorry|afraid)|sorry|(?:my )?apologies|i apologi[sz]e|unfortunately"
    r"|i regret)"
)
_NOT = r"(?:not able|unable|not (?:allowed|permitted|programmed|designed))"
_DENY = (
    rf"(?:can(?:no|'|’)t|can not|(?:am |(?:'|’)m ){_NOT}|(?:wo|do)n(?:'|’)t(?: be able| feel comfortable)?|will not"
    r"|(?:am|do) not (?=have access))"
)
_DEED = (
    r"(?:assist|help|provide|answer|fulfil+|comply|complete|do (?:that|this|it|so)|create|generate|support|discuss"
    r"|share|continue|engage|give|write|offer|respond|process|participate|access|browse|have (?:access|the ability))"
)
REFUSAL = re.compile(
    rf"\W*(?:{_SORRY}[^.!?\n]{{0,60}}?)?\b(?:as an ai[\w ,]*?)?(?:i|we) ?{_DENY} (?:to )?(?:\w+ )?{_DEED}"
    rf"|\W*{_SORRY}\W{{0,3}}(?:that )?(?:but )?(?:i|we)(?: am|(?:'|’)m)? ?(?:{_DENY}|not) \w+"
    rf"|\W*{_SORRY}[^.!?\n]{{0,60}}\bagainst (?:my|our) (?:guidelines|polic|programming)"
    rf"|\W*i (?:must|have to|need to|respectfully)?\W?(?:decline|refuse) to |\W*i (?:must|have to|need to) decline"
    rf"|\W*(?:it (?:is|would be) (?:not |in)appropriate for me|i do(?:n(?:'|’)t| not) feel comfortable)"
    rf"|\W*(?:Es tut mir leid|Tut mir leid|Entschuldigung)\b.{{0,40}}\bnicht\b|\W*Lo siento\b.{{0,20}}\bno puedo\b"
    rf"|\W*(?:Je suis )?désolée?\b.{{0,20}}\bje ne (?:peux|suis)\b"
    rf"|\W*(?:对不起|抱歉|很抱歉)[^。]{{0,6}}我?(?:无法|不能)"
    rf"|\W*(?:申し訳|すみません)[^。]{{0,20}}(?:できません|できかね)"
    rf"|\W*(?:Desculpe|Mi dispiace|Lamento).{{0,20}}\b(?:não|non|no) p[ou]",
    re.I,
)
SECOND_TASK = re.compile(
    r"^[^\w\n]{0,8}(?:\d{1,4}\.[ \t]{0,4})?(?:\*\*)?(?:Instruction|Prompt|指令)[ \t]{0,4}\d{0,4}[ \t]{0,4}(?:\*\*)?"
    r"[ \t]{0,4}[:：]|^[ \t]{0,8}(?:#{1,6}[ \t]{0,4})?(?:\n[ \t]{0,4}){0,2}\d{1,4}\.[ \t]{0,4}(?:Input|Output)"
    r"[ \t]{0,4}:|^#{3,6}[ \t]{0,4}(?:Input|Instruction|Task)\b",
    re.M | re.I,
)
NEXT_TURN = re.compile(
    r"\n[^\w\n]{0,8}(?:Q|Question|User|Human|Input|Task|Example)[ \t]{0,4}\d{0,4}[ \t]{0,4}:.{0,1000}?"
    r"\n[^\w\n]{0,8}(?:A|Answer|Assistant|AI|Bot|Output|Response)[ \t]{0,4}:"
    r"|\n[ \t\r]{0,8}\nHuman: ",
    re.S,
)
ASKS_FOR_TURNS = re.compile(
    r"\b(?:quiz\w*|q ?& ?a|questions|dialog(?:ue)?s?|script|interview|faqs?|flash ?cards?|test cases?"
    r"|examples?|trivia)\b",
    re.I,
)
LIST_ITEM = re.compile(r"\s*(?:[-*•–—―#|>]|\(?\w{1,3}[.):]\s)")
NUMBER_OF_ITEM = re.compile(r"(?m)^[ \t]{0,20}(?:\d{1,4}[.):]|[-*•])[ \t]+")
# Words after which an English sentence can't end.
DANGLING = re.compile(
    r"\b(?:an?|the|of|to|in|at|by|for|with|from|as|and|or|but|nor|if|which|whose|than|because|while|when|is|are|was|were"
    r"|be|been|has|have|had|will|would|can|could|should|may|might|must|do|does|did|its|their|his|her|my|your|our|they|he"
    r"|she|we),?$",
    re.I,
)
BARE_ITEM = re.compile(r"\n[ \t]{0,20}(?:[-*•]|\d{1,4}[.)])\Z")  # a list goes on, but with nothing
STOPPED = re.compile(r"[.!?…。！？:;][\"'”’)\]*_`]*$")
EMAIL = re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}\b")
NUMBER = re.compile(r"[+(\d][\d ()./-]{6,30}\d")
PHONE = re.compile(
    r"(?<![\w.,/-])(?:(?:\+\d{1,3}|1)[ .-]?)?(?:\(\d{2,4}\)[ .-]?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])"
    r"|(?<!\w)\+\d{1,3}[ .-]?(?:\(?\d{1,5}\)?[ .-]?){2,5}\d{2}\b|(?<![\w.,/-])0\d(?:[ .]\d\d){4}(?![\w-])"
    r"|(?<![\w.,/-])0\d{2,4}[ /-]\d{6,8}(?![\w-])"
)
PHONE_AHEAD = re.compile(r"\b(?:tel|phone|mobile|fax)\b\W{1,3}\Z", re.I)
CARD = re.compile(r"(?<![\w.])(?:(?:\d{4}[ -]){3}\d{4}|3\d{3}[ -]\d{6}[ -]\d{5}|\d{15,16}(?!\.\d))(?!\w)")
DIGITS = re.compile(r"\d\d\d|\+\d|\d\d[ .]\d\d[ .]")
ACCOUNT = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
SOCIAL = re.compile(r"(?<![\w-])(?!000|9\d\d|666)\d{3}-\d{2}-\d{4}(?![\w-])")
KEY = re.compile(r"\b(?:AKIA[0-9A-Z]{16}|sk-[\w-]{20,}|ghp_\w{36})\b")
# What UTF-8 may have been read as, beyond what ftfy knows; a run of such characters gives valid UTF-8 by chance almost
# never.
WRONG_ENCODINGS = ("cp1251", "cp1250", "cp1253", "cp1254", "mac_roman", "cp437")
WRONG_WIDE_ENCODINGS = ("cp932", "gb18030")  # of two bytes a character: short runs are valid by chance
FOREIGN = re.compile(r"[^\x00-\x7f]{3,}")
LITERAL = re.compile(r"\\n(?!abla|eq|eg|ot\b|u\b|i\b|mid|sub|ewline)")  # formulas have commands of that letter
SWAPPED_CASE = re.compile(r"\b[а-я][А-Я]{4,}\b")  # Cyrillic of one 8-bit encoding read as another


# Control characters in data or answers could move the cursor, clear the screen, rename the window or turn the writing
# direction: shown as their pictures instead.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
_PICTURES |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)  # halves of characters, which no encoding can write


def printable(text: str) -> str:
    """Text from data or a model, with control characters made visible and harmless."""
    return text.translate(_PICTURES)
