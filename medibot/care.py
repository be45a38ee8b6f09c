"""What people who read answers are told: the notice, and the rules that know a message about someone in danger now.

Rules and no model: they are the same each time, a reader can check them, and tests/emergencies.txt shows what they see.
They are a safety net with holes. That nothing is shown does not mean that nothing is wrong.
"""

import difflib
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

# --- what is not read further ------------------------------------------------------------------------------------------

MONTH = r"(?:january|february|march|april|may|june|july|august|september|october|november|december|spring|summer|autumn|fall|winter)"
# Said of what was long ago
PAST = re.compile(
    rf"\b(?:last (?:week|year|month|{MONTH})|(?:week|year|month|decade)s? (?:ago|back)|in (?:19|20)\d\d|in {MONTH}\b"
    r"|when (?:i|he|she|we|they) (?:was|were)|in the (?:past|war|army)|in (?:college|school|childhood)|as an? (?:child|kid|teen\w*|boy|girl)"
    r"|history of|used to|died|passed away|my late|survived|lost (?:\w+ ){1,3}to suicide|turned out|was suicidal|once at)\b"
)
# … unless it goes on
PRESENT = re.compile(
    r"\b(?:suddenly|just now|right now|tonight|(?:minutes?|hours?) ago|since this (?:morning|afternoon|evening)|and now|now (?:he|she|my|i|it|they))\b"
)
FIGURE = re.compile(
    r"\b(?:gave|give|giving|get|have) \w+ (?:a )?heart attack|\bdying (?:to|for|of (?:laughter|curiosity|boredom|hunger|embarrassment))\b"
    r"|\blaugh\w*\b|\blol\b|\bhaha\w*|\bjok(?:e|es|ing)\b|\bfiguratively\b|\b(?:kill|murder|die) (?:for|a)\b|\brather die\b|\bstroke of\b"
    r"|\b(?:overdos\w+|choking|choked) (?:on|in) (?:the |a )?(?:chocolate|sugar|netflix|cake|sun|coffee|price|prices|bill|final|news|vitamins?)\b"
    r"|\bin (?:this|these|that|those|my) (?:\w+ )?(?:dress|suit|shirt|corset|jeans|pants|shoes)\b|\bbleeding (?:money|edge|heart)\b"
    r"|\b(?:phone|battery|computer|laptop|car|team|market)(?:'s| is| has| was| had)? (?:a )?(?:dead|died|stroke|collapsed|choked)\b|\bthe exam\b"
)
# Books, news, school and work, where the danger is somebody else's or nobody's
ABOUT = re.compile(
    r"\b(?:novel|movie|film|story|character|essay|homework|article|news|podcast|textbook|class|lecture|course|students?|protocol|"
    r"teach\w*|quiz|research\w*|documentary|celebrity|pharmacy|i read|i'm reading|read about|insurance)\b"
)
# A question about the thing and not about somebody, or its mere name
GENERAL = re.compile(
    r"(?:(?:what|how|why|which|when|where|who|can|could|do|does|did|is|are|was|were|will|would|should)"
    r"(?:'s| (?:is|are|was|does|do|can|could|has|have))?\b(?!')(?! (?:my|he|she|his|her|this|that|it|someone|the (?:baby|pain))\b)"
    r"(?! (?:do|should|can|must|to) (?:i|we) (?:do|give)\b)|(?:symptoms?|signs?|treatments?|causes?|difference|history|explain|define"
    r"|tell me|describe|summari[sz]e|prevalence|prevention)\b)"
)
NEGATED = re.compile(
    r"\b(?:no|without|don't have|doesn't have|not|not having|never had)(?: any| really)? (?:(?:chest )?pain|trouble breathing"
    r"|shortness of breath|fever|bleeding|suicidal|swelling|numbness|thinking (?:about|of) \w+)\b(?: or [\w ]+?(?=,| but|$))?"
)
MILD = re.compile(r"\b(?:a bit(?: of)?|a little|slight(?:ly)?|mild(?:ly)?|tiny|small|minor|sometimes)(?: [\w'-]+){1,3}")

# --- what is danger ------------------------------------------------------------------------------------------------------

CANNOT = r"(?:can't|can (?:hardly|barely)|couldn't|won't|isn't|is not|not|barely|hardly|stopped|doesn't|didn't)"
AWFUL = r"(?:severe|terribl[ey]|awful|horrible|unbearable|excruciating|intense|worst|crushing|ripping|tearing|stabbing|agony|(?:really|so|very) bad)"
LIMB = r"(?:arm|leg|hand|foot|body|side|half)"
CHILD = r"(?:toddler|baby|kid|child|infant|son|daughter|boy|girl|niece|nephew|grandson|\d ?(?:yo|year old|month old))"
TOOK = r"(?:took|taken|swallow\w*|ate|eaten|drank|drunk|drinking|ingest\w*|inject\w*|snort\w*|got into|gave|put|chewed|downed)"
MEDICINE = (
    r"(?:pills?|tablets?|capsules?|med(?:s|icines?|ications?)|dos(?:e|es)|tylenol|paracetamol|acetaminophen|ibuprofen|aspirin|insulin"
    r"|antidepressants?|opioids?|oxycodone|methadone|xanax|morphine|heroin|fentanyl|coke|cocaine|meth|ecstasy|vodka|alcohol)"
)
POISON = (
    r"(?:bleach|antifreeze|\w* ?poison|\w* ?cleaner|detergent|batter(?:y|ies)|magnets?|weed ?killer|pesticide|acid|lye|ammonia"
    r"|(?:wild )?mushrooms?|methanol|gasoline|petrol|paint thinner)"
)
MANY = (
    r"(?:whole|entire|full|handful|bottle|packs?|box|all (?:of )?(?:my|the|his|her)|too (?:many|much)|\d\d+|(?:twen|thir|for|fif)ty|dozens?"
    r"|a (?:bunch|ton|lot) of|double|twice|triple|(?:two|three|four|five|ten) times)"
)
SELF = r"(?:my|him|her|your|them)sel(?:f|ves)"
DANGER = {
    "suicide": (
        rf"\b(?:kill|hang|shoot|harm|hurt|cut|stab)(?:ing|s|ting)? {SELF}\b|\bto kill me\b|\bslit\w* (?:my|her|his) wrist",
        r"\bwant(?:s|ing)? to die\b|\bend(?:ing)? (?:it all|it tonight|(?:my|her|his|their) (?:own )?life)\b|\btak(?:e|ing) (?:my|his|her) (?:own )?life\b",
        r"\b(?:don't|doesn't) want to (?:live|be alive|be here|exist|wake up)\b|\bno (?:reason|point) (?:to|in) liv|\bdone with life\b|\blife isn't worth",
        r"\bbetter off (?:without me|if i)|\bwish i (?:was|were) dead|\bwants? to jump\b|\bjump (?:off|in front)|\bcan't go on\b.{0,60}\b(?:rope|gun|pills|knife|over)\b",
        r"(?<!not )\bsuicidal(?! (?:thoughts in|people|teen))|\b(?:thinking|thoughts?|think) (?:about|of) (?:suicide|dying|killing|jumping|hanging)\b",
        r"\bgoodbye (?:note|letter)|\bvoices\b.{0,30}\bto (?:kill|stab|hurt|harm)\b|\bi want to disappear\b",
    ),
    "heart": (
        r"\b(?:pains?|ach(?:e|es|ing)|tight\w*|pressure|hurts?|squeez\w+|crushing|clutch\w*|grabb\w+|(?:sitting|standing) on|heav\w+|burning|stabbing)\b.{0,40}"
        r"\b(?:chest|breastbone|sternum)\b",
        r"\b(?:chest|breastbone|sternum)\b.{0,40}\b(?:pains?|ach(?:e|es|ing)|tight\w*|pressure|hurts?|squeez\w+|crushing|heav\w+|burning)\b",
        r"\b(?:having|is (?:it|this)|this is|could this be) an? heart attack|\bheart(?:'s)? (?:has )?(?:stopped|isn't beating)|\bno (?:pulse|heartbeat)",
        r"\b(?:heart|pulse)\b.{0,30}\b(?:racing|pounding|beating|slow\w*|irregular|[23]\d|1[5-9]\d|2\d\d)\b.{0,60}\b(?:faint|pass\w* out|black\w* out|dizzy|weak|breath\w*|seiz\w+)",
        r"\b(?:dizzy|faint|weak)\b.{0,30}\bpulse is [23]\d\b|\bpulse is [23]\d\b",
    ),
    "stroke": (
        r"\bhaving a stroke|\b(?:face|mouth|smile|eyelid)\b.{0,30}\b(?:droop\w*|hang\w*|sagg\w*|crooked|lopsided|numb|drop\w*)|\bone side of (?:\w+ )?(?:face|mouth)",
        r"\bslur\w+|\bgarbled|\bgibberish|\bwords\b.{0,20}\b(?:wrong|out)\b|\btalk(?:s|ing)? nonsense",
        rf"\b{CANNOT} (?:speak|talk|smile|lift|move|see|raise|find words)\b|\b{CANNOT} (?:feel|hold) (?:my|his|her)\b",
        rf"\b(?:lost|losing) (?:(?:my|his|her|all) )?(?:vision|sight)|\b{LIMB}\b.{{0,30}}\b(?:weak|limp|paraly\w+)\b(?!.{{0,30}}years)",
        rf"\b(?:numb\w*|weak\w*|paraly\w+)\b.{{0,25}}\b(?:side|half)\b|\b(?:side|half)\b.{{0,30}}\bnumb\w*|\b(?:left|right) {LIMB}\b.{{0,20}}\bnumb",
        r"\bworst headache|\bthunderclap|\bheadache\b.{0,40}\b(?:like a|stiff neck|confus\w+|seeing spots|out of nowhere)",
    ),
    "breathing": (
        rf"\b(?:{CANNOT}|trouble|struggl\w+|difficult\w*|hard|fight\w+|unable) (?:to )?(?:\w+ )?breath(?:e|ing|s)?\b|\bgasp\w*|\bshort of breath\b|\bcatch (?:my|his|her|a) breath",
        r"\b(?:struggl\w+|fight\w+|can't get|not) (?:for |getting )?(?:any |enough )?air\b|\bstopped breathing|\bwheez\w+",
        r"\b(?:turning|turned|went|going|is|he's|she's) (?:blue|purple|gr[ae]y)\b|\b(?:lips|face|fingers)\b.{0,15}\b(?:blue|purple|gr[ae]y)\b",
        r"\b(?:is|are|i'm|he's|she's|was) choking\b|\bstuck in (?:\w+ ){1,2}(?:throat|windpipe)|\bpulled\b.{0,30}\b(?:pool|water|lake|sea)\b",
        r"\bbreathing (?:\w+ )?(?:fast|slow\w*|weird\w*|shallow|rapid\w*|heav\w+)|\bgurgl\w+|\binhaler\b.{0,30}(?:isn't|doesn't|not|still|no help|\d+ times)",
        r"\bcough\w* up (?:\w+ )?blood",
    ),
    "allergy": (
        r"\b(?:tongue|lips?|throat|face|mouth|eyes)\b.{0,25}\b(?:swell\w*|swollen|clos(?:ing|ed)|tight\w*|huge|puff\w+|balloon)\b",
        r"\bswoll?en? (?:face|tongue|lips?|throat)|\b(?:used|gave) (?:\w+ )?(?:the |my |his |her )?(?:epipen|adrenaline)|\bstill swollen",
        r"\b(?:think|having|have|this is|going into|in)\b.{0,12}\banaphyla\w+|\b(?:having|severe) an? allergic reaction",
        r"\b(?:hives|rash|stung|sting|allergic|peanuts?)\b.{0,60}\b(?:dizzy|faint\w*|wheez\w+|vomit\w*|throat|collaps\w+|hard to breathe)\b",
    ),
    "bleeding": (
        r"\b(?:blood|bleed\w*)\b.{0,40}(?:\b(?:won't|can't|doesn't|not|never) stop|\beverywhere|\bspurt\w*|\bgush\w*|\bpour\w*|\bheav(?:y|ily)\b|\bbadly|\ba lot\b"
        r"|\bsoak\w*|\bthrough\b|\bto death|\bclots?\b|\bfor (?:over )?an hour|\bwarfarin|\bblood thinners?)",
        r"\b(?:blood|bleeding)\b.{0,20}\bcan't stop|\b(?:pregnan\w+|weeks)\b.{0,20}\bbleed\w*|\bspurting|\bhuge amounts? of (?:\w+ ){0,3}blood|\bstop the bleeding",
        r"\b(?:vomit\w*|throw\w* up|puk\w+|spit\w+)\b.{0,20}\b(?:blood|coffee grounds)|\bsoak\w* (?:through|a pad|the)|\b(?:stool|poop) is black",
        r"\bstab(?:bed| wound)|\b(?:got|been|was|is) shot\b|\bcut off\b|\bsever(?:ed|ing)|\bbone\b.{0,15}\b(?:sticking|out|visible)|\b(?:chainsaw|saw|knife) (?:went|slipped)",
        r"\bnose ?bleed\b.{0,30}\b(?:hour|\d+ min\w*|stop)",
    ),
    "injury": (
        r"\bhit by (?:a |the )?(?:car|truck|bus|train|lightning)|\bknocked out\b|\bout cold\b|\belectrocut\w+|\belectric shock",
        r"\bhit (?:my|his|her|their) head\b.{0,80}\b(?:vomit\w*|throw\w*|drows\w+|sleepy|confus\w+|seiz\w+|won't|keeps)",
        r"\b(?:boiling|scald\w*|hot oil)\b.{0,40}\b(?:all over|face|arms?|legs?|chest|skin|toddler\w*|child\w*)\b|\bskin is peeling",
        rf"\b(?:{POISON}|chemical)\b.{{0,25}}\beyes?\b|\beyes?\b.{{0,25}}\b(?:acid|bleach|lye|ammonia)\b",
        r"\b(?:bitten|bit)\b.{0,20}\b(?:\w*snake|viper|cobra|adder)\b",
    ),
    "poisoning": (
        r"\b(?:i|he|she|they|friend|roommate|we|think|has|have)(?:'ve|'s)? (?:just |has |have )?(?:overdosed|od'?d)\b|\boverdosed on \w+|\b(?:took|taken) an overdose",
        rf"\b{TOOK}\b.{{0,40}}\b{POISON}|\bmixed (?:bleach|ammonia)|\bcarbon monoxide alarm|\bsmell gas\b",
        rf"\b{TOOK}\b.{{0,30}}\b{MANY}\b.{{0,50}}\b{MEDICINE}\b|\b{TOOK}\b.{{0,50}}\b{MEDICINE}\b.{{0,30}}\b(?:twice|two|three|four|five|ten) ?(?:times)?\b",
        rf"\b{TOOK} (?:\w+ )?(?:whole|entire|handful|too (?:much|many)|[1-9]\d+ )|\b{CHILD}\b.{{0,50}}\b{TOOK}\b.{{0,40}}\b(?:{MEDICINE}|coins?|magnets?)\b",
        rf"\btoo much (?:{MEDICINE})\b|\bmixed\b.{{0,40}}\b(?:alcohol|oxycodone|heroin)|\b(?:has|have) alcohol poisoning",
        r"\btook \w+ times (?:my|his|her)|\bswallowed (?:a |some )?poison",
    ),
    "unconscious": (
        rf"\b{CANNOT} (?:be )?(?:wak\w+|woke\w*|rous\w+|respond\w*|answer\w*|awake|come (?:round|around|to)|coming (?:round|to))\b|\bcan't wake|\bunresponsive",
        r"\bunconscious\b(?! (?:of|bias|mind|patient))|\bbarely (?:conscious|awake|responsive)|\bcollapsed\b|\blost consciousness|\bblacked out\b(?! the)",
        r"\b(?:passed out|fainted)(?= (?:and|on|in|again|from|cold)\b|[,.!]|$)|\bjust fainted|\b(?:about to|going to|like) (?:pass(?:ing)? out|faint(?:ing)?)\b",
        r"\b(?:is|he's|she's|i'm) (?:having|in) (?:a |an )?(?:seizure|fit|convulsion)|\bhaving (?:a seizure|convulsions|seizures|a fit)|\bhe's seizing|\bis seizing",
        r"\b(?:seizures?|fit)\b.{0,40}\b(?:won't stop|in a row|minutes|still|didn't|not awake)|\b(?:shaking|jerking)\b.{0,30}\b(?:minutes|uncontrol\w+|jerking)",
        r"\b(?:is|went|are) (?:limp|floppy)\b|\bis (?:very |so )?drowsy|\bdelirious|\bisn't moving\b",
        r"\bconfused\b.{0,40}(?:\bstopped|\blift|\bfever|\bbreath|\bmottled|\bsweat)|\b(?:fever|vomiting|fell|suddenly|insulin|shaky|infection)\b.{0,60}\bconfused|\bmore confused",
    ),
    "other": (
        r"\bstiff neck\b.{0,40}\b(?:fever|rash)|\bfever\b.{0,40}\bstiff neck|\b(?:fever|temp\w*)\b.{0,12}\b(?:10[4-9]|4[01])\b|\brash that doesn't fade",
        r"\b(?:newborn|[1-9] (?:week|wk)s? old|[12] months? old)\b.{0,40}\b(?:fever|temperature)|\bno wet (?:diaper|nappy)",
        r"\bwater broke\b|\bcord\b.{0,10}$|\bfeel the cord|\bbaby\b.{0,20}\b(?:not|isn't|stopped) (?:mov\w+|kick\w+)|\b(?:haven't|not) felt (?:the|my) baby|\bhead is coming out",
        r"\bpregnant\b.{0,60}\b(?:seeing spots|face is swollen|bleed\w*)",
        rf"\b{AWFUL}\b.{{0,25}}\b(?:belly|stomach|abdom\w+|testicle|back)\b|\b(?:belly|stomach)\b.{{0,25}}\b(?:rock hard|hard as|rigid)|\btesticle\b.{{0,20}}\b(?:hurts|pain|swollen)",
        r"\b(?:sugar|glucose)\b.{0,15}\b(?:[1-4]\d|[4-9]\d\d)\b.{0,60}\b(?:vomit\w*|throw\w*|confus\w+|pass\w*|faint\w*|breath\w*|unresponsive|can't)",
        r"\bstopped (?:sweating|shivering)|\bskin is mottled|\b(?:call me|need) an ambulance|\bplease help\b|\bi need help\b|\bbreath(?:e)? help\b",
    ),
}
COMPILED = {kind: re.compile("|".join(patterns)) for kind, patterns in DANGER.items()}
# Asked about oneself in the form of a general question
METHOD = re.compile(
    r"\b(?:pills?|drugs?|way|ways|tablets?|painless\w*|easiest)\b.{0,40}\b(?:to die|(?:will|would) kill me|to kill (?:my|your)self|to end my life)\b"
    r"|\bto kill me\b|\bhow (?:do|can|should) i (?:kill|hang) myself"
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
SPELT = (
    "chest breathe breathing breath bleeding blood overdose overdosed seizure suicide suicidal unconscious swelling swollen choking stroke swallowed"
    " collapsed pressure tightness throat speech slurred vomiting pregnant unresponsive allergic fainted pills poison headache"
).split()


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
        if FIGURE.search(sentence) or ABOUT.search(sentence) or (PAST.search(sentence) and not PRESENT.search(sentence)):
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
    if not SOMEBODY.search(kept) and len(kept.split()) < 5:
        return None
    return next((kind for kind, pattern in COMPILED.items() if pattern.search(kept)), None)


def emergency_notice(message: str) -> str | None:
    """What stands before the model's answer to `message`; None where no rule sees a danger."""
    kind = danger(message)
    return None if kind is None else CRISIS if kind == "suicide" else EMERGENCY
