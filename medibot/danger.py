"""The words and patterns that speak of somebody in danger; medibot.care decides where they are looked for."""

import re


def near(first: str, second: str, gap: int = 40) -> str:
    """Both, in either order, at most `gap` characters apart."""
    return rf"\b(?:{first})\b.{{0,{gap}}}\b(?:{second})\b|\b(?:{second})\b.{{0,{gap}}}\b(?:{first})\b"


CANNOT = (
    r"(?:can't|unable to|can (?:hardly|barely)|couldn't|won't|isn't|not|barely|hardly|stopped|doesn't|didn't|hasn't)"
)
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
DAZED = r"confus\w+|not making sense|mumbl\w+|hallucinat\w+|seeing things|delirious|nonsense|gibberish|doesn't know (?:me|where|who|what)|drows\w+|sleepy|staring"
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
        r"\bon (?:the|a) (?:roof|ledge|bridge|edge of)\b|\b(?:loaded|bought|waving) (?:the|a) gun",
        r"\b(?:don't|can't) see a(?:ny)? way out|\bnoose\b|\btonight is the night|\b(?:said|say) (?:my|his|her) goodbyes|\bfarewell (?:message|letter|note)s?|\btrain tracks\b",
        r"\b(?:lethal|deadly) (?:for|dose)\b.{0,20}\b(?:me|my size|someone my)|\bdo something to myself|\bcar into a\b|\bpain to end\b|\b(?:could be|was|were) dead\b",
        r"\b(?:pills|tablets)\b.{0,20}\blined up|\b(?:hoard|sav)ing (?:\w+ )?(?:pills|tablets)|\bburning my (?:arms?|skin|legs?)|\btelling me to (?:kill|sacrifice|hurt|jump)",
    ),
    "heart": (
        near(r"chest|breastbone|sternum", HURT),
        r"\b(?:having|have|is (?:it|this)|this is|could this be) an? (?:heart attack|coronary)|\bheart(?:'s)? (?:has )?(?:stopped|isn't beating)|\bno (?:pulse|heartbeat)",
        near(
            r"(?:heart|pulse)\b.{0,30}\b(?:racing|pounding|beating|slow\w*|irregular|skipping|stopping|\d+)",
            rf"{FAINT}|breath\w*|seiz\w+",
            60,
        ),
        r"\bpulse (?:is )?[23]\d\b|\bangina\b.{0,50}\b(?:rest|won't|worse)|\bdefibrillator (?:shocked|went off)|\bheart (?:slowing|feels odd)",
    ),
    "stroke": (
        rf"\bhaving a stroke|\b(?:face|mouth|smile|eyelid)\b.{{0,30}}\b(?:{BROKEN})\b|\bone side of (?:\w+ )?(?:face|mouth)",
        r"\bslur\w+|\bgarbled|\bgibberish|\b(?:words|speech)\b.{0,25}\b(?:wrong|out|jumbl\w+|drunk|weird|strange)\b|\btalk\w* nonsense",
        rf"\b{CANNOT} (?:speak|talk|smile|lift|move|see|raise|walk|stand|find words|get (?:my|his|her) words)\b|\b{CANNOT} (?:feel|hold) (?:my|his|her|the)\b",
        r"\b(?:vision|sight)\b.{0,20}\b(?:lost|black|gone|went|dark)\b|\b(?:lost|losing)\b.{0,12}\b(?:vision|sight)\b|\bseeing double|\bsee two of",
        near(
            r"arm|leg|legs|hand|foot|body|side|half",
            r"(?:went |gone |is |so |now |has gone )(?:weak|limp|numb|dead|paraly\w+)|paralysed|paralyzed|limp",
        ),
        near(r"sudden\w*|all at once|minutes ago|just now", r"weak\w*|numb\w*|dizzy|blind|fell to|double vision"),
        near(
            r"numb\w*|weak\w*",
            r"(?:one|left|right) (?:side|half|arm|leg|hand)|side of (?:my|his|her)|half of (?:my|his|her)",
        ),
        near(
            r"headache",
            r"worst|thunderclap|explosive|sudden\w*|like a|stiff neck|neck is stiff|confus\w+|seeing spots|out of nowhere",
        ),
    ),
    "breathing": (
        rf"\b(?:{CANNOT}|trouble|struggl\w+|difficult\w*|hard|fight\w+) (?:to |for )?(?:\w+ )?(?:breath\w*|air)\b|\bgasp\w*|\bpanting\b|\bwheez\w+|\bcatch (?:\w+ )?breath|\bbreathless\b(?!ness)",
        near(
            r"breath\w*",
            r"short of|fast|slow\w*|weird\w*|shallow|rapid\w*|paus\w+|stopped|grunt\w*|gurgl\w*|whistl\w+|snor\w+|hurts|noisy|so bad",
            25,
        ),
        r"\bcan't get (?:\w+ )?air\b|\bgurgl\w+|\bribs\b.{0,15}\bsuck|\bsucking in\b|\boxygen (?:is |at |of )*[5-8]\d\b",
        r"\b(?:turn(?:ing|ed)|went|going|is|looks?|he's|she's|and) (?:blue|purple|gr[ae]y)\b|\b(?:lips|face|fingers|toes)\b.{0,15}\b(?:blue|purple|gr[ae]y)\b",
        r"\b(?:is|are|i'm|he's|she's|was) choking\b(?! up)|\bchoked on\b.{0,60}\b(?:throat|holding|still|can't)\b|\bstuck in (?:[\w']+ ){1,2}(?:throat|windpipe)",
        near(r"inhaler|puff(?:er|s)|asthma", r"isn't|doesn't|not|still|no help|nothing|empty|\d+ times", 30),
        near(r"smoke|inhaled|fumes", r"cough\w*|dizzy|breath\w*", 50),
        r"\b(?:pulled|was under|fished)\b.{0,30}\b(?:pool|water|lake|sea|river)\b",
    ),
    "allergy": (
        near(
            r"tongue|lips?|throat|face|mouth|eyes",
            r"swell\w*|swollen|clos(?:ing|ed)|tight\w*|huge|puff\w+|balloon|getting smaller",
            30,
        ),
        r"\b(?:used|gave) (?:\w+ )?(?:the |my |his |her )?(?:epipen|adrenaline)|\bstill swollen|\banaphyla\w+|\bsevere allergic reaction|\bhaving an allergic",
        near(
            r"hives|rash|stung|sting|allergic|peanuts?|wasp|bee",
            rf"{FAINT}|wheez\w+|vomit\w*|throat|hard to breathe|everywhere|swelling up",
            60,
        ),
    ),
    "bleeding": (
        near(BLOOD, rf"{LOTS}|{FAINT}", 40),
        r"\b(?:spurting|squirting|gushing)\b|\bcoffee grounds|\bstop the bleeding|\b(?:stool|poo|poop)s? (?:is|are) black|\bpassing clots|\bsoak\w* (?:through|a pad|the)",
        r"\bstab(?:bed| wound)|\b(?:got|been|was|is|someone) shot\b|\b(?:has|got|with) an? gunshot wound|\bsever(?:ed|ing) (?:finger|hand|arm|leg)",
        near(r"wound|gash|cut|bone", r"deep|bone|fat|sticking out|see the|artery"),
        near(
            r"fingers?|thumb|toes?|hand|arm|foot|leg",
            r"cut off|came off|hanging off|torn off|bent wrong|trapped|caught in|crushed",
        ),
        r"\bcut off (?:\w+ ){0,3}(?:finger|thumb|toe|hand)|\b(?:chainsaw|saw|knife) (?:went|slipped)|\b(?:dog|bear|shark) (?:tore|bit|mauled)\b.{0,20}\b(?:face|throat|neck)",
    ),
    "injury": (
        r"\bhit by (?:a |the )?(?:car|truck|bus|train|lightning)|\blightning hit|\bknocked out\b(?! with)|\bout cold\b|\belectrocut\w+|\belectric shock|\bexploded and",
        rf"\b(?:hit|kicked|banged|cracked|bumped)\b.{{0,20}}\bhead\b.{{0,60}}\b(?:vomit\w*|throw\w*|{DAZED}|seiz\w+|won't|keeps|pupil|warfarin)\b",
        near(
            r"fell|falls|fallen|thrown|jumped",
            r"(?:second|third|fourth) floor|window|roof|balcony|ladder|horse|can't feel|can't move|hip|screams?",
            60,
        ),
        near(
            r"crash|accident|lying on the (?:road|floor|ground)",
            r"trapped|bleeding|lying|not moving|isn't moving|won't|bent",
        ),
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
        near(
            r"seizures?|fit|shaking|jerking|twitching",
            r"won't stop|in a row|minutes|still|not awake|uncontrol\w+|all over|jerking|eyes roll\w*|doesn't hear",
        ),
        r"\b(?:is|went|are) (?:\w+ )?(?:limp|floppy)\b|, floppy\b|\bis (?:very |so )?drowsy|\b(?:isn't|not) moving\b|\bon the (?:bathroom )?floor\b",
        near(
            DAZED,
            r"fever|infection|sugar|diabetic|insulin|sweat\w*|shak\w+|shiver\w*|sudden\w*|since|hour|fell|freezing|cold|sun|heat|breath\w*|mottled|totally|temp\w*|more and more|lift",
            60,
        ),
    ),
    "other": (
        near(r"stiff neck|purple (?:rash|spots)|rash that doesn't fade", r"fever|rash|burning up|spreading|press", 60),
        r"\b(?:fever|temp\w*)\b.{0,12}\b(?:10[4-9]|4[01])\b|\bno wet (?:diaper|nappy)|\bhasn't peed\b|\bsunken eyes|\bnot feeding\b",
        near(r"newborn|[1-9] (?:week|wk)s? old|[12] months? old", r"fever|temperature|cold|limp"),
        r"\bwaters? broke\b|\bfeel the (?:umbilical )?cord|\bbaby\b.{0,20}\b(?:not|isn't|stopped|hasn't) (?:mov\w+|kick\w+)|\b(?:haven't|not) felt (?:the|my) baby|\bhead is coming out|\bbaby is coming\b|\bgave birth\b",
        near(
            r"pregnan\w+|\d\d weeks",
            r"spots|face is swollen|bleed\w*|contractions|blurred|lights|under (?:my|the) ribs|1[67]\d|cord",
        ),
        near(
            r"belly|stomach|abdom\w+|testicles?|back|shoulder blades",
            rf"(?:{AWFUL})|rock hard|hard as|rigid|like a board|doubled over",
            30,
        ),
        near(
            r"(?:sugar|glucose)\b.{0,15}\b(?:[1-4]\d|[4-9]\d\d|low?|3\d mmol)|ketones",
            r"vomit\w*|throw\w*|confus\w+|pass\w*|faint\w*|breath\w*|unresponsive|can't|sick|high|mumbl\w+",
            60,
        ),
        near(r"bladder|pee|between my legs", r"(?:numb|legs are) (?:numb|weak)|numb|can't control", 50),
        r"\bstopped (?:sweating|shivering)|\bskin is mottled|\b(?:call me|need) an ambulance|\b(?:please|pls) help\b|\bi need (?:emergency )?help\b|\bbreathe? (?:help|pls|please)\b|\bi'm dying\b",
        near(r"dialysis", r"missed")
        + r"|\bsickle cell crisis|\bhigh fever and (?:she|he|i)\b|\bavalanche|\b(?:he's|is) very cold",
        near(r"shivering|infection|fever", r"racing heart|mottled|confused|freezing"),
    ),
}
COMPILED = {kind: re.compile("|".join(patterns)) for kind, patterns in DANGER.items()}

# --- the wide net: single words that add up ------------------------------------------------------------------------------

# Two points each
GRAVE = r"""
collaps\w+ keeled slump\w* unconscious unresponsive seiz\w+ fits? convuls\w+ jerk\w* chok(?:e|ed|ing) suffocat\w+ gasp\w* strangl\w+ stridor purple paraly[sz]\w+
mute react overdos\w+ lethal noose ledge dying farewell bleed\w* blood(?!\s(?:pressure|tests?|sugar|work)) clots? stabb\w+ impal\w+ amputat\w+ crushed burnt scald\w* charred burst tourniquet tendon power\sline
electrocut\w+ drown\w* face\sdown poison\w* bleach caustic umbilical placenta miscarr\w+ anaphyla\w+ epipen ambulance unbearable agony chest breath\w* rouse wake
rigors sacrifice tarry gunshot viper rattlesnake heartbeat cpr clutching rambling slurr\w* gibberish explosive hypo dehydrated septic sepsis
"""
# One point each: what hurts or fails …
SIGNS = r"""
heart throat tongue lips? mouth face cheek eyes? vision arms? legs? foot hands? neck head belly tummy stomach ribs jaw shoulder skin calf testicles? balls? numb\w* weak\w*
dizz\w+ faint\w* vomit\w* puk\w+ sick throwing\sup fever temp\w* swell\w* swollen puff\w* welts hives confus\w+ foggy sleepy drows\w+ sweat\w* clammy freezing pale gr[ae]y
yellow rash dots spots pains? pulse pills? tablets? insulin codeine fentanyl meds medicine patches syrup packets? swallow\w* drank drunk eaten inject\w* downed chewed bit
weight feeling talk\w* walk\w* moved? weight tight\w* squeez\w* flops? droop\w* sagg\w+ speech words voice headache pregnant baby newborn toddler waters contractions kicks urine stools? ketones asthma inhaler
allerg\w+ reaction mixed packs? cramps diarrhoea diarrhea gin litre heat cold operation mind hornet wasp bee sting bone wound gash burn\w* fire limp floppy shiver\w* trembl\w* stagger\w* shak\w+ twitch\w* stiff infection thirsty cough\w* whistl\w*
wheez\w* stroke attack alone myself itch\w* hoarse blue
"""
# … and that it is now, sudden or beyond help
PRESSING = r"""
sudden\w* now tonight minutes? hours? this\smorning this\sevening out\sof\sthe\sblue won't can't couldn't keeps isn't worse help please pls nonstop everywhere huge twice lost
losing unable hardly barely by\saccident fell gone doesn't not only nothing hard\sto started burst all\snight since\slast
"""


def any_word(words: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(words.split())})\b")


POINTS = ((2, any_word(GRAVE)), (1, any_word(SIGNS)), (1, any_word(PRESSING)))
# Points that make a danger: the most that left the development table's precision above 0.95
ENOUGH = 3


def points(text: str) -> int:
    """How many different words of the wide net `text` holds, by their weight."""
    return sum(weight * len(set(words.findall(text))) for weight, words in POINTS)
