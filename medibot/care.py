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
    r"|when (?:i|he|she|we|they) (?:was|were)|in the (?:past|war|army)|in the (?:\w+ties|war)|at birth|in (?:college|school|childhood)|as an? (?:child|kid|teen\w*|boy|girl)"
    r"|history of|used to|died|passed away|my late|survived|after (?:the|my|his|her|a) (?:stroke|surgery|operation|crash|concussion|anaphylaxis)|every month|lost (?:\w+ ){1,3}to suicide|turned out|was suicidal|once at)\b"
)
# … unless it goes on
PRESENT = re.compile(
    r"\b(?:suddenly|just now|right now|tonight|(?:minutes?|hours?) ago|since this (?:morning|afternoon|evening)|and now|now (?:he|she|my|i|it|they))\b"
)
FIGURE = re.compile(
    r"\b(?:gave|give|giving|get|have) \w+ (?:a )?heart attack|\bdying (?:to|for|of (?:laughter|curiosity|boredom|hunger|embarrassment))\b"
    r"|\blaugh\w*\b|\blol\b|\bhaha\w*|\bjok(?:e|es|ing)\b|\bfiguratively\b|\b(?:kill|murder|die) (?:for|a)\b|\brather die\b|\bstroke of\b"
    r"|\b(?:overdos\w+|choking|choked) (?:on|in) (?:the |a )?(?:chocolate|sugar|netflix|cake|sun|coffee|price|prices|bill|final|news|vitamins?)\b"
    r"|\bin (?:this|these|that|those|my) (?:\w+ )?(?:dress|suit|shirt|corset|jeans|pants|shoes)\b|\bbleeding (?:money|edge|heart)\b|\bbreath away\b|\bin the back at\b|\b(?:fake|stage) blood\b|\bdie a\b|\bkill me if\b|\bmyself some slack\b|\bscared me\b"
    r"|\b(?:phone|battery|computer|laptop|car|team|market)(?:'s| is| has| was| had)? (?:a )?(?:dead|died|stroke|collapsed|choked)\b|\bthe exam\b"
)
# Books, news, school and work, where the danger is somebody else's or nobody's
ABOUT = re.compile(
    r"\b(?:novel|movie|film|story|character|essay|homework|article|news|podcast|textbook|downtown|class|lecture|course|students?|protocol|"
    r"teach\w*|quiz|research\w*|documentary|comedy|celebrity|pharmacy|thesis|statistics|poster|book club|the game|lecture|i read|i'm reading|read about|insurance)\b"
)
# A question about the thing and not about somebody, or its mere name
GENERAL = re.compile(
    r"(?:(?:what|how|why|which|when|where|who|can|could|do|does|did|is|are|was|were|will|would|should)"
    r"(?:'s| (?:is|are|was|does|do|can|could|has|have))?\b(?!')(?! (?:my|he|she|his|her|this|that|it|someone|the (?:baby|pain))\b)"
    r"(?! (?:do|should|can|must|to) (?:i|we) (?:do|give)\b)|(?:symptoms?|signs?|treatments?|causes?|difference|history|explain|define"
    r"|tell me|describe|summari[sz]e|prevalence|prevention)\b|[\w ]+ (?:vs|versus)\b)"
)
NEGATED = re.compile(
    r"\b(?:no|without|don't have|doesn't have|not|not having|never had)(?: any| really)? (?:(?:chest )?pain|trouble breathing"
    r"|shortness of breath|fever|bleeding|suicidal|swelling|numbness|stiff neck|rash|headache|vomiting|blood|thinking (?:about|of) \w+)\b(?: or [\w ]+?(?=,| but|$))?"
)
MILD = re.compile(r"\b(?:a bit(?: of)?|a little|slight(?:ly)?|mild(?:ly)?|tiny|small|minor|sometimes)(?: [\w'-]+){1,3}")

# --- what is danger ------------------------------------------------------------------------------------------------------


def near(first: str, second: str, gap: int = 40) -> str:
    """Both, in either order, at most `gap` characters apart."""
    return rf"\b(?:{first})\b.{{0,{gap}}}\b(?:{second})\b|\b(?:{second})\b.{{0,{gap}}}\b(?:{first})\b"


CANNOT = r"(?:can't|unable to|can (?:hardly|barely)|couldn't|won't|isn't|not|barely|hardly|stopped|doesn't|didn't|hasn't)"
AWFUL = r"severe\w*|terribl[ey]|awful|horrible|unbearable|excruciating|intense|worst|crushing|ripping|tearing|stabbing|agony|(?:really|so|very) bad|so much"
BROKEN = r"droop\w*|hang\w*|sagg\w*|crooked|lopsided|slack|numb|dropp\w*|twisted|pulled|slid"
HURT = (
    r"pains?|ach(?:e|es|ing)|tight\w*|pressure|hurt\w*|squeez\w+|crush\w*|heav\w+|burn\w*|stab\w*|tear\w*|rubb\w+|clutch\w*|grabb\w+|band"
    r"|elephant|(?:sitting|standing) on"
)
FAINT = r"faint\w*|pass\w* out|black\w* out|dizz\w+|light-?headed|weak|collaps\w+"
CHILD = r"toddler|baby|kid|child|infant|son|daughter|boy|girl|niece|nephew|grand(?:son|daughter)|little one|\d ?(?:yo|year old|month old)"
TOOK = r"took|taken|swallow\w*|ate|eaten|drank|drunk|drinking|ingest\w*|inject\w*|snort\w*|got (?:into|hold of)|gave|put|chewed|downed|licked|mixed up"
MEDICINE = (
    r"pills?|tablets?|capsules?|med(?:s|icines?|ications?)|dos(?:e|es)|painkillers?|tylenol|paracetamol|acetaminophen|ibuprofen|aspirin|insulin"
    r"|antidepressants?|opioids?|oxycodone|methadone|xanax|morphine|heroin|fentanyl|coke|cocaine|meth|ecstasy|vodka|tequila|whisky"
)
POISON = (
    r"bleach|antifreeze|\w* ?poison|\w* ?cleaner|detergent|dishwasher \w+|batter(?:y|ies)|magnets?|weed ?killer|pesticide|acid|lye|ammonia|lamp oil"
    r"|(?:wild )?mushrooms?|berry|berries|methanol|rubbing alcohol|gasoline|petrol|paint thinner"
)
MANY = (
    r"whole|entire|full|handful|bottle|packs?|box|all (?:of )?(?:my|the|his|her)|too (?:many|much)|a lot more|\d\d+|(?:twen|thir|for|fif)ty|dozens?"
    r"|a (?:bunch|ton|lot) of|double|twice|triple|(?:two|three|four|five|ten) times|by mistake"
)
BLOOD = r"blood(?! (?:tests?|pressure|sugar|work|types?|thinners?))|bleed\w*|clots"
LOTS = (
    r"(?:won't|can't|doesn't|not|never|to|keeps?) (?:stop\w*|bleed\w*)|everywhere|spurt\w*|squirt\w*|gush\w*|pour\w*|pump\w*|heav(?:y|ily)|badly|a lot|lots|like crazy"
    r"|soak\w*|through|to death|clots?|cup\w*|all night|hours?|warfarin|blood thinners|trapped|huge|threw up|throw\w* up|vomit\w*|puk\w+|spit\w*"
    r"|cough\w* up|pregnan\w+|stop the|weeks"
)
DAZED = (
    r"confus\w+|not making sense|mumbl\w+|hallucinat\w+|seeing things|delirious|nonsense|gibberish|doesn't know (?:me|where|who|what)|drows\w+|sleepy|staring"
)
SELF = r"(?:my|him|her|your|them)sel(?:f|ves)"
WEAPON = r"gun|razor|rope|knife|blade|pills|tablets"
DANGER = {
    "suicide": (
        rf"\b(?:kill(?!er)|hang|shoot|harm|hurt|cut|stab)(?:ed|ing|s|ting)? {SELF}\b(?! some)|\bkill me\b(?! if)|\b(?:slit|cut)\w* (?:my|her|his) wrist",
        r"\bwant(?:s|ing)? (?:to die|out)\b|\bend(?:s|ing)? (?:it\b|things|everything|(?:my|her|his|their) (?:own )?life)|\btak(?:e|ing) (?:my|his|her) (?:own )?life\b",
        r"\b(?:don't|doesn't) want to (?:live|be alive|be here|exist|wake up)\b|\b(?:reason|point) (?:to|in) (?:keep )?liv|\bdone with life\b|\blife (?:isn't worth|is pointless)",
        r"\b(?:better off|miss me|care) (?:without me|if i)\b|\bwish i (?:was|were) dead|\bwants? to jump\b|\bjump (?:off|in front)|\bnever wake up\b|\bnot wake up\b",
        near(WEAPON, rf"end|goodbye|can't go on|in my hand|to my|on {SELF}|i'm done|locked"),
        r"(?<!not )\bsuicidal(?! (?:thoughts in|people|teen))|\bmy suicide\b|\b(?:thinking|thoughts?|think) (?:about|of) (?:suicide|dying|killing|jumping|hanging)\b",
        r"\bgoodbye (?:note|letter|everyone)|\bvoices\b.{0,30}\b(?:kill|stab|hurt|harm|die)\b|\bi want to disappear\b|\b(?:going|want) to hurt my\b|\bhurt my (?:kids|baby|child)|\bgoing to take all\b",
        r"\bon (?:the|a) (?:roof|ledge|bridge|edge of)\b|\b(?:loaded|bought) (?:the|a) gun",
    ),
    "heart": (
        near(r"chest|breastbone|sternum", HURT),
        r"\b(?:having|have|is (?:it|this)|this is|could this be) an? (?:heart attack|coronary)|\bheart(?:'s)? (?:has )?(?:stopped|isn't beating)|\bno (?:pulse|heartbeat)",
        near(r"(?:heart|pulse)\b.{0,30}\b(?:racing|pounding|beating|slow\w*|irregular|skipping|stopping|\d+)", rf"{FAINT}|breath\w*|seiz\w+", 60),
        r"\bpulse (?:is )?[23]\d\b|\bangina\b.{0,50}\b(?:rest|won't|worse)|\bdefibrillator (?:shocked|went off)|\bheart (?:slowing|feels odd)",
    ),
    "stroke": (
        rf"\bhaving a stroke|\b(?:face|mouth|smile|eyelid)\b.{{0,30}}\b(?:{BROKEN})\b|\bone side of (?:\w+ )?(?:face|mouth)",
        r"\bslur\w+|\bgarbled|\bgibberish|\b(?:words|speech)\b.{0,25}\b(?:wrong|out|jumbl\w+|drunk|weird|strange)\b|\btalk\w* nonsense",
        rf"\b{CANNOT} (?:speak|talk|smile|lift|move|see|raise|walk|stand|find words|get (?:my|his|her) words)\b|\b{CANNOT} (?:feel|hold) (?:my|his|her|the)\b",
        r"\b(?:vision|sight)\b.{0,20}\b(?:lost|black|gone|went|dark)\b|\b(?:lost|losing)\b.{0,12}\b(?:vision|sight)\b|\bseeing double|\bsee two of",
        near(r"arm|leg|legs|hand|foot|body|side|half", r"(?:went |gone |is |so |now |has gone )(?:weak|limp|numb|dead|paraly\w+)|paralysed|paralyzed|limp"),
        near(r"sudden\w*|all at once|minutes ago|just now", r"weak\w*|numb\w*|dizzy|blind|fell to|double vision"),
        near(r"numb\w*|weak\w*", r"(?:one|left|right) (?:side|half|arm|leg|hand)|side of (?:my|his|her)|half of (?:my|his|her)"),
        near(r"headache", r"worst|thunderclap|explosive|sudden\w*|like a|stiff neck|neck is stiff|confus\w+|seeing spots|out of nowhere"),
    ),
    "breathing": (
        rf"\b(?:{CANNOT}|trouble|struggl\w+|difficult\w*|hard|fight\w+) (?:to |for )?(?:\w+ )?(?:breath\w*|air)\b|\bgasp\w*|\bpanting\b|\bwheez\w+|\bcatch (?:\w+ )?breath|\bbreathless\b(?!ness)",
        near(r"breath\w*", r"short of|fast|slow\w*|weird\w*|shallow|rapid\w*|paus\w+|stopped|grunt\w*|gurgl\w*|whistl\w+|snor\w+|hurts|noisy|so bad", 25),
        r"\bcan't get (?:\w+ )?air\b|\bgurgl\w+|\bribs\b.{0,15}\bsuck|\bsucking in\b|\boxygen (?:is |at |of )*[5-8]\d\b",
        r"\b(?:turn(?:ing|ed)|went|going|is|looks?|he's|she's|and) (?:blue|purple|gr[ae]y)\b|\b(?:lips|face|fingers|toes)\b.{0,15}\b(?:blue|purple|gr[ae]y)\b",
        r"\b(?:is|are|i'm|he's|she's|was) choking\b(?! up)|\bchoked on\b.{0,60}\b(?:throat|holding|still|can't)\b|\bstuck in (?:[\w']+ ){1,2}(?:throat|windpipe)",
        near(r"inhaler|puff(?:er|s)|asthma", r"isn't|doesn't|not|still|no help|nothing|empty|\d+ times", 30),
        near(r"smoke|inhaled|fumes", r"cough\w*|dizzy|breath\w*", 50),
        r"\b(?:pulled|was under|fished)\b.{0,30}\b(?:pool|water|lake|sea|river)\b",
    ),
    "allergy": (
        near(r"tongue|lips?|throat|face|mouth|eyes", r"swell\w*|swollen|clos(?:ing|ed)|tight\w*|huge|puff\w+|balloon|getting smaller", 30),
        r"\b(?:used|gave) (?:\w+ )?(?:the |my |his |her )?(?:epipen|adrenaline)|\bstill swollen|\banaphyla\w+|\bsevere allergic reaction|\bhaving an allergic",
        near(r"hives|rash|stung|sting|allergic|peanuts?|wasp|bee", rf"{FAINT}|wheez\w+|vomit\w*|throat|hard to breathe|everywhere|swelling up", 60),
    ),
    "bleeding": (
        near(BLOOD, rf"{LOTS}|{FAINT}", 40),
        r"\b(?:spurting|squirting|gushing)\b|\bcoffee grounds|\bstop the bleeding|\b(?:stool|poo|poop)s? (?:is|are) black|\bpassing clots|\bsoak\w* (?:through|a pad|the)",
        r"\bstab(?:bed| wound)|\b(?:got|been|was|is|someone) shot\b|\b(?:has|got|with) an? gunshot wound|\bsever(?:ed|ing) (?:finger|hand|arm|leg)",
        near(r"wound|gash|cut|bone", r"deep|bone|fat|sticking out|see the|artery"),
        near(r"fingers?|thumb|toes?|hand|arm|foot|leg", r"cut off|came off|hanging off|torn off|bent wrong|trapped|caught in|crushed"),
        r"\bcut off (?:\w+ ){0,3}(?:finger|thumb|toe|hand)|\b(?:chainsaw|saw|knife) (?:went|slipped)|\b(?:dog|bear|shark) (?:tore|bit|mauled)\b.{0,20}\b(?:face|throat|neck)",
    ),
    "injury": (
        r"\bhit by (?:a |the )?(?:car|truck|bus|train|lightning)|\blightning hit|\bknocked out\b(?! with)|\bout cold\b|\belectrocut\w+|\belectric shock|\bexploded and",
        rf"\b(?:hit|kicked|banged|cracked|bumped)\b.{{0,20}}\bhead\b.{{0,60}}\b(?:vomit\w*|throw\w*|{DAZED}|seiz\w+|won't|keeps|pupil|warfarin)\b",
        near(r"fell|falls|fallen|thrown|jumped", r"(?:second|third|fourth) floor|window|roof|balcony|ladder|horse|can't feel|can't move|hip|screams?", 60),
        near(r"crash|accident|lying on the (?:road|floor|ground)", r"trapped|bleeding|lying|not moving|isn't moving|won't|bent"),
        near(r"boiling|scald\w*|hot oil", r"face|arms?|legs?|chest|skin|toddler\w*|child\w*"),
        rf"\b(?:{POISON}|chemical|nail|metal|glass)\b.{{0,25}}\beyes?\b|\beye suddenly hurts|\bskin is (?:peeling|coming off)|\bskin\b.{{0,6}}\bcoming off",
        r"\b(?:bitten|bit)\b.{0,20}\b(?:\w*snake|viper|cobra|adder|copperhead)\b|\b(?:\w*snake|viper|cobra|adder|copperhead) bit (?:me|my|him|her|his)\b|\bafter the dive\b",
    ),
    "poisoning": (
        r"\b(?:i|he|she|they|friend|roommate|we|think|has|have)(?:'ve|'s)? (?:just |has |have )?(?:overdosed|od'?d)\b|\boverdosed on \w+|\b(?:took|taken) an overdose",
        rf"\b(?:{TOOK})\b.{{0,40}}\b(?:{POISON})\b|\b(?:{POISON})\b.{{0,20}}\bin (?:my|his|her) mouth|\bmixed (?:bleach|ammonia)|\bfoaming at",
        r"\b(?:co|carbon monoxide|gas) (?:alarm|detector)|\bsmell (?:of )?gas\b",
        near(rf"(?:{TOOK})\b.{{0,40}}\b(?:{MANY})", MEDICINE, 50),
        rf"\b(?:{TOOK})\b.{{0,50}}\b(?:{MEDICINE})\b.{{0,40}}\b(?:{MANY})\b|\b(?:{TOOK}) (?:\w+ )?(?:whole|entire|handful|[1-9]\d+ )",
        rf"\b(?:{CHILD})\b.{{0,50}}\b(?:{TOOK})\b.{{0,40}}\b(?:{MEDICINE}|coins?|magnets?)\b|\btook \w+ times (?:my|his|her)",
        rf"\b(?:{TOOK})\b.{{0,30}}\b(?:something|pills|husband's|wife's)\b.{{0,70}}\b(?:twitch\w*|barely|burning up|blue|unresponsive|dies?|foam\w*|heart|strange)\b",
        rf"\btoo much (?:{MEDICINE})\b|\bmixed\b.{{0,40}}\b(?:alcohol|oxycodone|heroin)|\balcohol poisoning|\bshot up and\b",
    ),
    "unconscious": (
        rf"\b{CANNOT} (?:be )?(?:\w+ )?(?:wak\w+|woke\w*|rous\w+|respond\w*|answer\w*|awake|get (?:\w+ ){{1,3}}to wake|come (?:round|around|to)|coming (?:round|to))\b|\bunresponsive|\bkeep (?:him|her) awake",
        r"\bunconscious\b(?! (?:of|bias|mind|patient))|\bbarely (?:conscious|awake|responsive)|\bcollapsed\b(?! into)|\b(?:lost|losing) consciousness|\bblacked out\b(?! the)|\bdrifting off",
        r"\b(?:is|just|has|he's|she's|have|i) (?:just )?passed out\b(?! \w+ (?:about|at))|\b(?:passed out|fainted)(?= (?:and|on|twice|again|from|cold|breathing)\b|[,.!]|$)|\bjust fainted",
        r"\b(?:about to|going to|like i'll|feel like|nearly|feel very) (?:pass(?:ing|ed)? out|faint(?:ing|ed)?|black out)\b",
        r"\b(?:is|he's|she's|i'm|just) (?:having|had|in) (?:a |an )?(?:seizure|fit|convulsion)|\bhaving (?:a seizure|convulsions|seizures|a fit)|\b(?:he's|is|and) seizing",
        near(r"seizures?|fit|shaking|jerking|twitching", r"won't stop|in a row|minutes|still|not awake|uncontrol\w+|all over|jerking|eyes roll\w*|doesn't hear"),
        r"\b(?:is|went|are) (?:\w+ )?(?:limp|floppy)\b|, floppy\b|\bis (?:very |so )?drowsy|\b(?:isn't|not) moving\b|\bon the (?:bathroom )?floor\b",
        near(DAZED, r"fever|infection|sugar|diabetic|insulin|sweat\w*|shak\w+|shiver\w*|sudden\w*|since|hour|fell|freezing|cold|sun|heat|breath\w*|mottled|totally|temp\w*|more and more|lift", 60),
    ),
    "other": (
        near(r"stiff neck|purple (?:rash|spots)|rash that doesn't fade", r"fever|rash|burning up|spreading|press", 60),
        r"\b(?:fever|temp\w*)\b.{0,12}\b(?:10[4-9]|4[01])\b|\bno wet (?:diaper|nappy)|\bhasn't peed\b|\bsunken eyes|\bnot feeding\b",
        near(r"newborn|[1-9] (?:week|wk)s? old|[12] months? old", r"fever|temperature|cold|limp"),
        r"\bwaters? broke\b|\bfeel the (?:umbilical )?cord|\bbaby\b.{0,20}\b(?:not|isn't|stopped|hasn't) (?:mov\w+|kick\w+)|\b(?:haven't|not) felt (?:the|my) baby|\bhead is coming out|\bbaby is coming\b|\bgave birth\b",
        near(r"pregnan\w+|\d\d weeks", r"spots|face is swollen|bleed\w*|contractions|blurred|lights|under (?:my|the) ribs|1[67]\d|cord"),
        near(r"belly|stomach|abdom\w+|testicles?|back|shoulder blades", rf"(?:{AWFUL})|rock hard|hard as|rigid|like a board|doubled over", 30),
        near(r"(?:sugar|glucose)\b.{0,15}\b(?:[1-4]\d|[4-9]\d\d|low?|3\d mmol)|ketones", r"vomit\w*|throw\w*|confus\w+|pass\w*|faint\w*|breath\w*|unresponsive|can't|sick|high|mumbl\w+", 60),
        near(r"bladder|pee|between my legs", r"(?:numb|legs are) (?:numb|weak)|numb|can't control", 50),
        r"\bstopped (?:sweating|shivering)|\bskin is mottled|\b(?:call me|need) an ambulance|\b(?:please|pls) help\b|\bi need (?:emergency )?help\b|\bbreathe? (?:help|pls|please)\b|\bi'm dying\b",
        near(r"dialysis", r"missed") + r"|\bsickle cell crisis|\bhigh fever and (?:she|he|i)\b|\bavalanche|\b(?:he's|is) very cold",
        near(r"shivering|infection|fever", r"racing heart|mottled|confused|freezing"),
    ),
}
COMPILED = {kind: re.compile("|".join(patterns)) for kind, patterns in DANGER.items()}
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
    if not SOMEBODY.search(kept) and len(kept.split()) < 4:
        return None
    return next((kind for kind, pattern in COMPILED.items() if pattern.search(kept)), None)


def emergency_notice(message: str) -> str | None:
    """What stands before the model's answer to `message`; None where no rule sees a danger."""
    kind = danger(message)
    return None if kind is None else CRISIS if kind == "suicide" else EMERGENCY
