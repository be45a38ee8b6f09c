"""What people who read answers are told: the notice, and the rules that know a message about someone in danger now.

Rules and no model: they are the same each time, a reader can check them, and tests/emergencies.txt shows what they see.
They are a safety net with holes. That nothing is shown does not mean that nothing is wrong.
"""

import re

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

# Said of what was long ago, or not meant: such sentences are not read further
PAST = re.compile(
    r"\b(?:last (?:year|summer|winter|spring|autumn|fall|month)|(?:years?|months?|decades?) ago|in (?:19|20)\d\d"
    r"|when i was|in the past|as a child|history of|died (?:of|by|from)|survived)\b"
)
FIGURE = re.compile(
    r"\b(?:nearly|almost) gave (?:me|us) a|\bdying (?:to|for|of (?:laughter|curiosity|boredom))\b|\bdie laughing"
    r"|\bkill for\b|\brather die\b|\bstroke of\b|\b(?:with|from) laughter|\blaughing\b|\blol\b|\bfiguratively\b"
    r"|\bin this (?:dress|suit|shirt|corset)|\boverdosed on (?:chocolate|sugar|netflix|cake|sun|coffee)|\bphone died"
)
# A question about the thing and not about somebody
GENERAL = re.compile(
    r"(?:what|how|why|which|when|where|who|can|could|do|does|did|is|are|was|were|will|would|should)\b"
    r"(?! (?:it|this|that|my|he|she|i|we|someone|the (?:baby|pain))\b)"
)
SOMEBODY = re.compile(
    r"\b(?:i|i'm|i've|me|my|we|our|he|he's|she|she's|his|her|him|they|someone|somebody|baby|grandpa|grandma|dad|mom|mum)\b"
    r"|\b(?:right now|suddenly|sudden|since (?:an hour|this morning)|for \d+ minutes|help)\b"
)
CANNOT = (
    r"(?:can't|cannot|can not|can (?:hardly|barely)|couldn't|won't|will not|isn't|is not|not|barely|hardly|stopped)"
)
DANGER = {
    "suicide": (
        r"\b(?:kill|hang|shoot|harm|hurt|cut)(?:ing|s)? (?:my|him|her|your|them)sel(?:f|ves)\b|\bto kill me\b",
        r"\bwants? to die\b|\bend (?:my|her|his) life\b|\bend it all\b|\btake my (?:own )?life\b|\bdone with life\b",
        r"\bdon't want to (?:live|be alive|be here)|\bno reason to live|\bbetter off without me|\bwant to jump\b",
        r"\b(?:am|i'm|feel|feeling) suicidal|\bthinking (?:about|of) suicide",
    ),
    "heart": (
        r"\b(?:pains?|tight\w*|pressure|hurts?|squeez\w+|crushing|clutching|sitting on|heavy)\b.{0,40}\bchest\b",
        r"\bchest\b.{0,40}\b(?:pains?|tight\w*|pressure|hurts?|squeez\w+|crushing|heavy)\b",
        r"\bhaving a heart attack|\bheart (?:stopped|isn't beating|is not beating|is racing)|\bpulse is [23]\d\b|\bno pulse",
    ),
    "stroke": (
        r"\bhaving a stroke|\b(?:face|mouth|smile)\b.{0,25}\b(?:droop\w*|hanging|numb)|\bslurr\w+|\bgarbled",
        rf"\b{CANNOT} (?:speak|talk|smile|lift|move|see)\b|\bcan't feel (?:my|his|her)\b|\blost (?:my )?(?:vision|sight)",
        r"\b(?:numb\w*|weak\w*)\b.{0,20}\bone side|\bworst headache",
    ),
    "breathing": (
        rf"\b(?:{CANNOT}|trouble|struggling to|difficulty) (?:\w+ )?breath(?:e|ing)\b|\bgasping|\bturning blue|\blips are blue",
        r"\bcatch my breath|\bthroat is closing|\b(?:tongue|throat|face|lips)\b.{0,12}\b(?:is|are) swelling|\bis choking",
        r"\bused (?:my|the|his|her) epipen|\binhaler (?:isn't|is not|doesn't|does not)|\bcoughing up blood",
    ),
    "bleeding": (
        r"\bblood (?:won't|will not|doesn't) stop|\bbleeding\b.{0,40}\bcan't stop|\bbleeding (?:heavily|badly|a lot|through|to)",
        r"\bspurting|\b(?:vomiting|throwing up|puking)\b.{0,20}\b(?:blood|coffee grounds)|\bblood everywhere",
        r"\bstabbed|\b(?:got|been|was) shot\b|\bcut off\b|\bboiling water|\bstool is black",
    ),
    "poisoning": (
        r"\boverdosed?\b|\bcarbon monoxide alarm|\bbit(?:ten)? by a snake",
        r"\b(?:took|taken|swallowed|ate|eaten|drank|drunk|put)\b.{0,30}\b(?:bleach|antifreeze|poison|drain cleaner|detergent|battery)",
        r"\b(?:took|taken|swallowed|ate|eaten|injected)\b.{0,20}\b(?:bottle|handful|too (?:much|many)|\d\d+|all (?:my|the)|times (?:my|his|her))",
        r"\btook .{0,30}\b(?:pills|tablets|dose) twice|\b(?:toddler|baby|kid|child|son|daughter) (?:ate|swallowed|took)\b",
        r"\bmixed\b.{0,40}\b(?:alcohol|oxycodone|heroin)",
    ),
    "unconscious": (
        r"\bunconscious and|\bis unconscious|\bunresponsive|\bnot responding|\bnot answering|\bcan't be woken|\bstill not awake",
        rf"\b{CANNOT} wake|\bcollapsed\b(?! in the)|\bpassed out and|\bpass out$|\bjust fainted|\bfainted and",
        r"\bhaving (?:a seizure|convulsions)|\bseizure that|\bhad a fit and|\bshaking and jerking|\bdelirious|\bis limp\b|\band is limp",
        r"\bconfused\b.{0,30}(?:\bstopped|\blift|\bfever)|\b(?:fever|vomiting|fell|suddenly)\b.{0,60}\bconfused|\bconfused and",
    ),
    "other": (
        r"\bstiff neck\b.{0,30}\bfever|\bfever of 10[4-9]|\bnewborn\b.{0,40}\bfever|\bhit (?:my|his|her) head and keeps",
        r"\bhit by a car|\bisn't moving|\bcord\b.{0,10}$|\bsuddenly hurts|\bworst (?:belly|stomach|abdominal) pain|\bsplashed with",
        r"\bcall me an ambulance|\bplease help\b|\bi need help\b",
    ),
}
COMPILED = {kind: re.compile("|".join(patterns)) for kind, patterns in DANGER.items()}


def danger(message: str) -> str | None:
    """The kind of danger that `message` describes somebody to be in now ("heart", "suicide", …), or None.

    Sentences about the past, figures of speech and general questions are left out; what remains must speak of somebody
    and match a rule.
    """
    text = " ".join(message.lower().replace("\u2019", "'").split())
    sentences = [part.strip() for part in re.split(r"(?<=[.?!;])\s+", text)]
    kept = " ".join(s for s in sentences if not (PAST.search(s) or FIGURE.search(s) or GENERAL.match(s)))
    if COMPILED["suicide"].search(kept) or re.search(r"\bto kill me\b", text):
        return "suicide"
    if not SOMEBODY.search(kept):
        return None
    return next((kind for kind, pattern in COMPILED.items() if pattern.search(kept.rstrip(".!?"))), None)


def emergency_notice(message: str) -> str | None:
    """What stands before the model's answer to `message`; None where no rule sees a danger."""
    kind = danger(message)
    return None if kind is None else CRISIS if kind == "suicide" else EMERGENCY
