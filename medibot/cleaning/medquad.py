"""Mend or drop what is defective in MedQuAD (Ben Abacha and Demner-Fushman, BMC Bioinformatics 20, 511, 2019).

Every function that takes `row` or `rows` is a rule, as in `rules`; `medibot.cleaning` names it "medquad.<function>", and
lists.yaml has the order that recipes use.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from medibot.cleaning.rules import Row, fold, with_text

QUESTION_OPENING = re.compile(
    r"(?:What|How|Is|Are|Can|Could|Do|Does|Why|Which|Who)\b(?:[^?.!\n]|[.!](?!\s)){,250}\?(?=\s)"
)
YES_OR_NO = re.compile(r"(?:Yes|No|Not necessarily|Maybe|Possibly)\b[.,;:!]")
SYMPTOM_TABLE = re.compile(
    r"\s*The Human Phenotype Ontology provides the following list of signs and symptoms for .*?"
    r"(?:Sometimes, no information on frequency is available\.\s+"
    r"In these cases, the sign or symptom may be rare or common\.\s*|\Z)",
    re.S,
)
MISSING_TOPIC = re.compile(
    r"(?:What is \(are\)|What causes|How to (?:diagnose|prevent)|What to do for|Who is at risk for|Is\s+inherited"
    r"|What is the outlook for|What are the [\w ]+ (?:of|for|to)|How many people are affected by)[\s?]*"
)
AGENCY = re.compile(
    r"(?:^|\s{2,})(?:NIH: [^\n.]+|Genetics Home Reference"
    r"|(?:Dept\. of|Department of|United States|National|Centers? for|Agency for|Bureau of|Administration on)"
    r" [^\n.]+|(?:Food and Drug|Occupational Safety and Health|Health Resources and Services) Administration"
    r"|(?:Environmental Protection|Federal Emergency Management) Agency)\s*\Z"
)
DAMAGED_QUANTITY = re.compile(
    r"\b1 (?:ounces|cups|pints|quarts|pounds|teaspoons|tablespoons|liters|inches)\b"  # "1 1/2" lost its half
    r"|\b(?:3[5-9]|4[0-2]|9\d|10\d)\.\d0 [CF]\b"  # the degree sign became a zero
)
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')]))(?<!U\.S\.)(?<!Dr\.)(?<!vs\.)\s+")
# An address often ends its sentence without a stop
URL_END = re.compile(r"((?:https?://|\bwww\.)\S*[^\s.?!])\s+(?=[A-Z])")
ASIDE = r"\s*\((?:See|Watch the video|For (?:more )?information)\b(?:[^()]|\([^()]*\))*\)(\.?)"
REFERENCES = Path(__file__).with_name("references.txt").read_text(encoding="utf-8")
REFERENCE = re.compile(rf"[(*]*(?:{'|'.join(re.findall('(?m)^[^#].*', REFERENCES))})", re.S)

# A closed list of words that cannot be anything else: {damaged word: word}, each small one with a capital, too
LOST_LETTERS = {"a persons": "a person's", "caf au lait": "café au lait"}
for word in re.sub("(?m)^#.*$", "", Path(__file__).with_name("lost_letters.txt").read_text(encoding="utf-8")).split():
    ascii_only = "".join(c for c in word if c.isascii())
    LOST_LETTERS |= {damaged: word for damaged in (ascii_only, ascii_only.replace("'", "")) if damaged != word}
LOST_LETTERS |= {old[0].upper() + old[1:]: new[0].upper() + new[1:] for old, new in LOST_LETTERS.items()}
LOST_LETTER_WORD = re.compile(r"(?<![\w'-])(?:" + "|".join(sorted(LOST_LETTERS, key=len, reverse=True)) + r")(?![\w'])")

# The words of a topic that decide between "is" and "are", and the ends in "s" that are singular.
TOPIC_HEAD = re.compile(r".+?(?= \(| (?:of|in|with|for|due|without)\b|: |\Z)", re.I)
SINGULAR = re.compile(
    r"[^s]\Z|(?:ss|us|is|ans|ics|oides|etes|/aids|'s|herpes|rickets|measles|mumps|shingles|rabies|scabies|\bgas)\Z"
    r"|\APrevent ",
    re.I,
)
TOPIC_PREFIX = re.compile(r"(?<=\s)(?:What I need to know about|Causes of|Parasites -)\s+")


# Template in the file -> a question as people ask it; \1 is the topic.
QUESTIONS = {
    r"What is \(are\) (.+)\?": r"What is \1?",
    r"How to diagnose (.+)\?": r"How is \1 diagnosed?",
    r"How to prevent (.+)\?": r"How can \1 be prevented?",
    r"What to do for (.+)\?": r"What should I know about \1?",
    r"Do you have information about (.+)\?": r"What can you tell me about \1?",
    r"[Ww]hat research (?:\(.+?\) )?is being done for (.+)\?": r"What research is being done on \1?",
}


def drop_link_lists(row: Row) -> Row | None:
    """Drop answers that are a list of resources whose links are gone (Genetics Home Reference)."""
    return None if (row["completion"] or "").startswith("These resources ") else row


def drop_page_dumps(row: Row) -> Row | None:
    """Drop answers that hold a whole web page with its menus (CDC)."""
    return None if re.search(r"On this Page [A-Z]", row["completion"] or "") else row


def drop_topicless_questions(row: Row) -> Row | None:
    """Drop questions whose topic is missing: "How to prevent  ?"."""
    return None if MISSING_TOPIC.fullmatch(row["prompt"] or "") else row


def cut_repeated_question(row: Row) -> Row:
    """Cut the question that opens an answer of GARD; other sources open with a question to lead the reader."""
    answer = (row["completion"] or "").strip()
    opening = QUESTION_OPENING.match(answer) if row.get("document_source") == "GARD" else None
    if opening is None:
        return row
    rest = answer[opening.end() :].strip()
    # "Yes." answers the question that would be cut, not the row's own, unless that one is answered by yes or no too.
    if YES_OR_NO.match(rest) and not re.match(r"(?:Is|Are|Can|Do|Does)\b", row["prompt"] or ""):
        return row
    return with_text(row, "completion", rest)


def cut_symptom_table(row: Row) -> Row | None:
    """Cut the flattened table of the Human Phenotype Ontology, introduction and footer; drop a row left empty."""
    answer = row["completion"] or ""
    if "The Human Phenotype Ontology provides the following list of signs and symptoms for " not in answer:
        return row
    prose = SYMPTOM_TABLE.sub(" ", answer).strip()
    return with_text(row, "completion", prose) if prose else None


def cut_summary_prefix(row: Row) -> Row:
    """Cut "Summary :" at the start (MedlinePlus health topics)."""
    return with_text(row, "completion", re.sub(r"\A\s*Summary\s*:\s*", "", row["completion"] or ""))


def cut_key_points(row: Row) -> Row:
    """Cut the "Key Points" list, whose entries stand again as the headings below it (CancerGov)."""
    cut = re.sub(r"(?:\A|\n)\s*Key Points[ \t]*\n[^\n]+\n(?=\s*\S)", "\n", row["completion"] or "")
    return with_text(row, "completion", cut.lstrip())


def split_squashed_bullets(row: Row) -> Row:
    """Put each bullet and each paragraph that only wide spaces set apart on a line of its own."""
    answer = re.sub(r"\s{2,}- +(?=\S)", "\n- ", row["completion"] or "")
    if row.get("document_source") == "NIHSeniorHealth":  # its dashes are written "--", so that this is a bullet
        answer = re.sub(r"(?<!\d)[^\S\n]+-[^\S\n]+(?=\S)", "\n- ", answer)
    return with_text(row, "completion", re.sub(r"(?<=\S)[ \t\xa0]{4,}(?=[^\s-])", "\n\n", answer))


def cut_agency_credit(row: Row) -> Row:
    """Cut the name of the agency after the last sentence (MedlinePlus health topics)."""
    if row.get("document_source") != "MPlusHealthTopics":
        return row
    return with_text(row, "completion", AGENCY.sub("", row["completion"] or ""))


def cut_list_copies(row: Row) -> Row:
    """Cut the run of text that repeats the bullets above it without their marks (NIHSeniorHealth)."""
    lines: list[str] = []
    items: list[str] = []
    for line in (row["completion"] or "").split("\n"):
        lines.append(line)
        if not line.startswith("- "):
            items = []
            continue
        items.append(line[2:])
        twice = re.fullmatch(r"(.{20,}?) \1(?: (.*))?", items[-1])
        copies = [(twice[1], twice[2] or "")] if twice else []
        for start in range(len(items) - 1):
            item, copied, rest = items[-1].partition(f" {' '.join(items[start:-1])} ")
            if copied and rest.startswith(item):
                copies.append((item, rest[len(item) :].strip()))
        if copies:
            (item, rest), items = copies[0], []
            lines[-1:] = [f"- {item}", "", rest] if rest else [f"- {item}"]
    return with_text(row, "completion", "\n".join(lines).rstrip())


def cut_link_sentences(row: Row) -> Row:
    """Cut sentences that only send the reader to a page, link, video or section that the answer does not hold."""
    lines, in_link_list = [], False
    for line in (row["completion"] or "").split("\n"):
        if in_link_list and (line.startswith("- ") or not line.strip()):
            continue
        # The full stop behind an aside stays, unless its sentence has one before it
        whole = re.sub(ASIDE, r"\1", re.sub(r"(?<=[.!?:])" + ASIDE, "", line)) if "(" in line else line
        sentences = SENTENCE_END.split(URL_END.sub(r"\1. ", whole) if "http" in whole or "www." in whole else whole)
        # A longer one is a flattened list without full stops, and most of it says something
        kept = [one for one in sentences if len(one.split()) > 50 or not REFERENCE.fullmatch(one.removeprefix("- "))]
        in_link_list = sentences[-1] not in kept and sentences[-1].endswith(":")
        left = line if kept == sentences and whole == line else " ".join(kept).strip()
        lines += [left] if left or not line else []
    text = "\n".join(lines)
    return row if text == row["completion"] else with_text(row, "completion", re.sub(r"\n{3,}", "\n\n", text).strip())


def restore_letters(row: Row) -> Row:
    """Restore apostrophes and accents that were deleted, from a closed list of words that cannot be anything else."""
    for column in ("prompt", "completion"):
        row = with_text(row, column, LOST_LETTER_WORD.sub(lambda word: LOST_LETTERS[word[0]], row[column] or ""))
    return row


def drop_damaged_quantities(row: Row) -> Row | None:
    """Drop answers with a quantity that lost a character: "1 ounces" was "1 1/2 ounces", "38.50 C" was "38.5 °C"."""
    return None if DAMAGED_QUANTITY.search(row["completion"] or "") else row


def ask_naturally(row: Row) -> Row:
    """Ask as people do: "What is Gout?", not "What is (are) Gout ?"; "How is Gout diagnosed?", not "How to ..."."""
    question = " ".join((row["prompt"] or "").split())
    if not question:
        return row
    question = TOPIC_PREFIX.sub("", question.rstrip(" ?"), count=1) + "?"
    for template, natural in QUESTIONS.items():
        if match := re.fullmatch(template, question):
            head = TOPIC_HEAD.match(match[1])
            if natural == r"What is \1?" and head and not SINGULAR.search(head[0]):
                natural = r"What are \1?"
            question = match.expand(natural)
    return with_text(row, "prompt", question[0].upper() + question[1:])


def keep_specific_cuis(rows: Iterable[Row], max_topics: int = 5) -> Iterator[Row]:
    """Make `umls_cui` ("C01|C02") a list of the concepts that at most `max_topics` topics share, fit for grouping.

    Concepts such as "Syndrome" (268 topics) would chain unrelated rows. It counts over the rows it is given, so that it
    stands before the rules that drop. It holds all of them, since the last row decides about the first.
    """
    rows, topics = list(rows), defaultdict(set)
    for row in rows:
        for cui in (row.get("umls_cui") or "").split("|"):
            topics[cui].add(fold(row.get("question_focus") or ""))
    for row in rows:
        cuis = [cui for cui in (row.get("umls_cui") or "").split("|") if cui and len(topics[cui]) <= max_topics]
        yield row | {"umls_cui": cuis} if row.get("umls_cui") else row
