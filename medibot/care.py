"""What people who read answers are told: the notice, and the rules that know a message about someone in danger now.

Rules and no model: they are the same each time, a reader can check them, and tests/emergencies.txt shows what they see.
They are a safety net with holes. That nothing is shown does not mean that nothing is wrong.
"""

import difflib
import re

from medibot.danger import COMPILED, ENOUGH, points

NOTICE = (
    "Not a medical device and no diagnosis: general health information that can be wrong or out of date. "
    "Ask a professional; in an emergency, call for help."
)
EMERGENCY = (
    "This may be an emergency. Do not wait for an answer here: call your emergency number now "
    "(112 in Europe and on most mobile phones, 911 in North America, 999 in the UK, 000 in Australia)."
)
CRISIS = (
    "If you or someone near you may come to harm, call your emergency number now, or talk to someone: "
    "988 in the US and Canada, 116 123 in the UK and Ireland, or findahelpline.com for other countries. You are not alone."
)

# --- what is not read further ------------------------------------------------------------------------------------------

MONTH = r"(?:january|february|march|april|may|june|july|august|september|october|november|december|spring|summer|autumn|fall|winter)"
# Said of what was long ago
PAST = re.compile(
    rf"\b(?:last (?:week|year|month|{MONTH})|(?:week|year|month|decade)s? (?:ago|back)|in (?:19|20)\d\d|in {MONTH}\b"
    r"|when (?:i|he|she|we|they) (?:was|were)|in the (?:past|war|army)|in the (?:\w+ties|war)|at birth|in (?:college|school|childhood)|as an? (?:child|kid|teen\w*|boy|girl)"
    r"|history of|used to|died|passed away|my late|survived|after (?:the|my|his|her|a) (?:stroke|surgery|operation|crash|concussion|anaphylaxis)|every month|lost (?:\w+ ){1,3}to suicide|turned out|since (?:19|20)\d\d|i once|scars?|-free year|was suicidal|once at)\b"
)
# … unless it goes on
PRESENT = re.compile(
    r"\b(?:suddenly|just now|right now|tonight|(?:minutes?|hours?) ago|since this (?:morning|afternoon|evening)|and now|now (?:he|she|my|i|it|they))\b"
)
FIGURE = re.compile(
    r"\b(?:gave|give|giving|get|have) \w+ (?:a )?heart attack|\bdying (?:to|for|of (?:laughter|curiosity|boredom|hunger|embarrassment))\b"
    r"|\blaugh\w*\b|\blol\b|\bhaha\w*|\bjok(?:e|es|ing)\b|\bfiguratively\b|\b(?:kill|murder|die) (?:for|a)\b|\brather die\b|\bstroke of\b"
    r"|\b(?:overdos\w+|choking|choked) (?:on|in) (?:the |a )?(?:chocolate|sugar|netflix|cake|sun|coffee|price|prices|bill|final|news|vitamins?)\b"
    r"|\bin (?:this|these|that|those|my) (?:\w+ )?(?:dress|suit|shirt|corset|jeans|pants|shoes)\b|\bbleeding (?:money|edge|heart)\b|\bbreath away\b|\bin the back at\b|\b(?:fake|stage) blood\b|\bdie a\b|\bkill me if\b|\bmyself some slack\b|\bscared me\b|\bin love\b|\ban arm and a leg\b|\bgasping for a\b|\bi'd (?:rather )?(?:shoot|kill|hang)\b|\bchoked up\b|\b(?:sore throat|leg day)\b|\b(?:sweat|blood), (?:sweat|blood)|\bat the gym\b|\btastes like\b"
    r"|\b(?:phone|battery|computer|laptop|car|team|market)(?:'s| is| has| was| had)? (?:a )?(?:dead|died|stroke|collapsed|choked)\b|\bthe exam\b"
)
# Books, news, school and work, where the danger is somebody else's or nobody's
ABOUT = re.compile(
    r"\b(?:novel|movie|film|story|character|essay|homework|article|news|podcast|a drill|dummy|dummies|textbook|downtown|class|lecture|course|students?|protocol|"
    r"teach\w*|quiz|research\w*|documentary|comedy|celebrity|pharmacy|thesis|statistics|poster|book club|the game|lecture|i read|i'm reading|read about|insurance)\b"
)
# A question about the thing and not about somebody, or its mere name
GENERAL = re.compile(
    r"(?:(?:what|how|why|which|when|where|who|can|could|do|does|did|is|are|was|were|will|would|should)"
    r"(?:'s| (?:is|are|was|does|do|can|could|has|have))?\b(?!')(?! (?:my|he|she|his|her|this|that|it|someone|the (?:baby|pain))\b)"
    r"(?! (?:do|should|can|must|to) (?:i|we) (?:do|give)\b)|(?:the )?(?:symptoms?|signs?|treatments?|causes?|difference|history|explain|define"
    r"|tell me|describe|summari[sz]e|prevalence|prevention)\b|[\w ]+ (?:vs|versus)\b)"
)
NEGATED = re.compile(
    r"\b(?:no|without|don't have|doesn't have|not|not having|never had)(?: any| really)? (?:(?:chest )?pain|trouble breathing"
    r"|shortness of breath|fever|bleeding|suicidal|swelling|numbness|stiff neck|rash|headache|vomiting|blood|thinking (?:about|of) \w+)\b(?: or [\w ]+?(?=,| but|$))?"
)
MILD = re.compile(r"\b(?:a bit(?: of)?|a little|slight(?:ly)?|mild(?:ly)?|tiny|small|minor|sometimes)(?: [\w'-]+){1,3}")

# Asked about oneself in the form of a general question
METHOD = re.compile(
    r"\b(?:pills?|drugs?|way|ways|tablets?|painless\w*|easiest)\b.{0,40}\b(?:to die|(?:will|would) kill me|to kill (?:my|your)self|to end my life)\b"
    r"|\bto kill me\b|\b(?:should|would|could) i (?:just |better )?(?:kill|hang|shoot) myself|\bhow (?:do|can|should) i (?:kill|hang) myself"
)
SOMEBODY = re.compile(
    r"\b(?:i|i'm|i've|me|my|we|our|he|he's|she|she's|his|her|him|they|us|someone|somebody|baby|\w*father|\w*mother|grandpa|grandma|dad|mom|mum|husband|wife"
    r"|partner|son|daughter|brother|sister|friend|neighbor|child|kid|toddler|pregnant|you)\b"
    r"|\b(?:now|sudden|suddenly|since|tonight|today|this morning|(?:minutes|hours?)|can't|won't|isn't|doesn't|help|been|got)\b"
)
INFORMAL = {
    "cant": "can't", "cannot": "can't", "can not": "can't", "dont": "don't", "do not": "don't", "doesnt": "doesn't", "does not": "doesn't",
    "wont": "won't", "will not": "won't", "isnt": "isn't", "is not": "isn't", "didnt": "didn't", "did not": "didn't", "im": "i'm", "i am": "i'm",
    "ive": "i've", "i have": "i've", "hes": "he's", "shes": "she's", "wanna": "want to", "gonna": "going to", "couldnt": "couldn't",
    "havent": "haven't", "have not": "haven't",
}  # fmt: skip
# Words that a frightened hand misspells, found by the nearest spelling
SPELT = [
    "chest",
    "breathe",
    "breathing",
    "breath",
    "bleeding",
    "blood",
    "overdose",
    "overdosed",
    "seizure",
    "suicide",
    "suicidal",
    "unconscious",
    "swelling",
    "swollen",
    "choking",
    "stroke",
    "swallowed",
    "collapsed",
    "pressure",
    "tightness",
    "throat",
    "speech",
    "slurred",
    "vomiting",
    "pregnant",
    "unresponsive",
    "allergic",
    "fainted",
    "pills",
    "poison",
    "headache",
]


def normalised(message: str) -> str:
    """Lower case, one kind of apostrophe, contractions written out one way, key words spelt right."""
    text = " ".join(message.lower().replace("\u2019", "'").split())
    text = re.sub(rf"\b(?:{'|'.join(INFORMAL)})\b(?!')", lambda found: INFORMAL[found.group()], text)

    def spelt(found: re.Match[str]) -> str:
        word = found.group()
        return word if word in SPELT else next(iter(difflib.get_close_matches(word, SPELT, 1, 0.88)), word)

    return re.sub(r"(?<![\w'])[a-z]{4,}(?![\w'])", spelt, text)


def present(text: str) -> str:
    """What of a normalised message may speak of a danger that is there now."""
    kept = []
    for sentence in re.split(r"(?<=[.?!;:])\s+", text):
        if GENERAL.match(sentence):
            # "What do I give him, he can't breathe": what follows the question counts
            sentence = sentence.partition(",")[2].strip()
            if GENERAL.match(sentence):
                continue
        if (
            FIGURE.search(sentence)
            or ABOUT.search(sentence)
            or (PAST.search(sentence) and not PRESENT.search(sentence))
        ):
            continue
        kept.append(MILD.sub(" ", NEGATED.sub(" ", sentence)))
    return " ".join(kept).rstrip(".!? ")


def danger(message: str) -> str | None:
    """The kind of danger that `message` describes somebody to be in now ("heart", "suicide", …), or None.

    Sentences about the past, figures of speech, general questions, books, news and what is denied or mild are left out;
    what remains must speak of somebody and match a rule.
    """
    text = normalised(message)
    kept = present(text)
    if COMPILED["suicide"].search(kept) or METHOD.search(text):
        return "suicide"
    # Two or three words without a person are what one types to read about a thing
    if not SOMEBODY.search(kept) and len(kept.split()) < 4:
        return None
    kinds = (kind for kind, pattern in COMPILED.items() if pattern.search(kept))
    return next(kinds, "signs" if points(kept) >= ENOUGH else None)


def emergency_notice(message: str) -> str | None:
    """What stands before the model's answer to `message`; None where no rule sees a danger."""
    kind = danger(message)
    return None if kind is None else CRISIS if kind == "suicide" else EMERGENCY
