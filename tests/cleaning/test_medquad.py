import pytest

from medibot.cleaning import NAMED_LISTS, Cleaning, rule_problem
from medibot.cleaning.rules import fold


def row(completion, prompt="What is (are) Gout ?", index=0, **columns):
    return {"row": index, "prompt": prompt, "completion": completion, **columns}


def clean(rows, items):
    cleaning = Cleaning(items)
    return list(cleaning(rows)), cleaning.ledger()


def apply(rule, completion, **columns):
    """The answer after `rule`, or None where the row was dropped."""
    left = clean([row(completion, **columns)], [f"medquad.{rule}"])[0]
    return left[0]["completion"] if left else None


def test_a_list_of_resources_without_links_is_dropped():
    assert apply("drop_link_lists", "These resources address the care of gout:  - Gene Site: Gout  - Test List") is None
    prose = "Diet helps. These resources may help too."
    assert apply("drop_link_lists", prose) == prose


def test_a_whole_web_page_is_dropped():
    assert apply("drop_page_dumps", "On this Page General Information What is gout? Who gets gout?") is None
    prose = "On this page, you read about gout."
    assert apply("drop_page_dumps", prose) == prose


@pytest.mark.parametrize(
    "prompt", ["What is (are)  ?", "How to prevent  ?", "Who is at risk for ? ?", "What are the symptoms of ?"]
)
def test_a_question_without_a_topic_is_dropped(prompt):
    assert apply("drop_topicless_questions", "It is a disease.", prompt=prompt) is None


@pytest.mark.parametrize(
    "prompt", ["What are the symptoms of Ulna, absence of ?", "Is gout inherited ?", "What causes it ?"]
)
def test_a_question_with_an_odd_topic_is_kept(prompt):
    assert apply("drop_topicless_questions", "It is a disease.", prompt=prompt) == "It is a disease."


def test_the_repeated_question_is_cut():
    text = "What are the signs and symptoms of dance type 1.5? Jerking of the limbs. Is it rare? Yes."
    assert apply("cut_repeated_question", text, document_source="GARD") == "Jerking of the limbs. Is it rare? Yes."


def test_a_leading_question_of_another_source_is_kept():
    text = "Is your child thirsty? Offer water often."
    assert apply("cut_repeated_question", text, document_source="MPlusHealthTopics") == text


def test_a_question_is_kept_when_yes_would_lose_its_meaning():
    text = "Can adults with gout drink milk? Yes. It does them good."
    assert apply("cut_repeated_question", text, document_source="GARD") == text
    asked = apply("cut_repeated_question", text, document_source="GARD", prompt="Is milk good for gout ?")
    assert asked == "Yes. It does them good."


def test_a_sentence_that_ends_before_the_question_mark_is_no_question():
    text = "How gout begins is known. Who gets it? Many people do."
    assert apply("cut_repeated_question", text, document_source="GARD") == text


TABLE = (
    "The Human Phenotype Ontology provides the following list of signs and symptoms for Gout. If known, see how often. "
    "Signs and Symptoms Approximate number of patients (when available) Red toe 90% Fever - Footer about the table. "
    "Sometimes, no information on frequency is available. In these cases, the sign or symptom may be rare or common."
)


def test_the_symptom_table_is_cut_and_the_prose_around_it_kept():
    assert apply("cut_symptom_table", f"The toe hurts. {TABLE} Rest helps.") == "The toe hurts. Rest helps."


def test_a_row_that_is_only_a_symptom_table_is_dropped():
    assert apply("cut_symptom_table", TABLE) is None
    assert apply("cut_symptom_table", "The toe hurts.") == "The toe hurts."


def test_the_summary_prefix_is_cut():
    assert apply("cut_summary_prefix", "Summary : Gout hurts. Summary : no.") == "Gout hurts. Summary : no."


def test_the_key_points_are_cut_and_their_headings_below_kept():
    text = "Key Points\n      - Gout hurts.    - Rest helps.\n   \n   \n      Gout hurts.\n   It is sudden."
    assert apply("cut_key_points", text).split("\n") == ["Gout hurts.", "   It is sudden."]
    assert apply("cut_key_points", "The Key Points are few.\nRest.") == "The Key Points are few.\nRest."


def test_squashed_bullets_and_paragraphs_get_lines_of_their_own():
    text = "Signs are       - a red toe    - pain - or heat       Rest helps."
    assert apply("split_squashed_bullets", text) == "Signs are\n- a red toe\n- pain - or heat\n\nRest helps."


def test_a_dash_between_words_is_no_bullet_except_where_dashes_are_written_double():
    text = "It is mild - or not - in most. Ages 5 - 10 count."
    assert apply("split_squashed_bullets", text) == text
    senior = apply("split_squashed_bullets", "Signs are - heat - pain", document_source="NIHSeniorHealth")
    assert senior == "Signs are\n- heat\n- pain"


@pytest.mark.parametrize(
    "agency", ["NIH: National Institute of Toes", "Food and Drug Administration", "Centers for Toe Care"]
)
def test_the_agency_credit_is_cut(agency):
    text = f"Rest helps.\n\n{agency}"
    assert apply("cut_agency_credit", text, document_source="MPlusHealthTopics") == "Rest helps."
    assert apply("cut_agency_credit", text, document_source="NIDDK") == text


def test_an_agency_within_a_sentence_is_kept():
    text = "Ask the Food and Drug Administration"
    assert apply("cut_agency_credit", text, document_source="MPlusHealthTopics") == text


def test_the_copy_of_a_list_is_cut():
    text = "Signs are\n- a red toe\n- pain\n- heat. a red toe pain heat. Rest helps.\n- one more\n- thing"
    assert (
        apply("cut_list_copies", text) == "Signs are\n- a red toe\n- pain\n- heat.\n\nRest helps.\n- one more\n- thing"
    )


def test_the_copy_of_a_list_with_one_bullet_is_cut():
    assert (
        apply("cut_list_copies", "- a swollen and red toe. a swollen and red toe. Rest.")
        == "- a swollen and red toe.\n\nRest."
    )


def test_lists_that_share_only_some_words_are_kept():
    text = "Signs are\n- a red toe\n- pain in a red toe at night\n- heat"
    assert apply("cut_list_copies", text) == text


@pytest.mark.parametrize(
    "reference",
    [
        "Click here to learn more.",
        "For more information, go to the Toes article.",
        "More information is provided in the NIDDK health topic, Toes.",
        "You can read more about toes at the following link: http://toes.example/gout",
        "General information about clinical trials is available from the NCI website.",
        "(See the PDQ summary on Toes (Adult) for more information.)",
        "(Watch the video to learn about toes. To enlarge the video, click the brackets (Esc).)",
        "To see the laboratories, click here.",
        "Learn more about toes.",
        "For more information, see the U.S. Department of Toes.",
    ],
)
def test_a_sentence_that_only_points_elsewhere_is_cut(reference):
    assert apply("cut_link_sentences", f"Gout hurts. {reference} Rest helps.") == "Gout hurts. Rest helps."


@pytest.mark.parametrize(
    "text",
    [
        "Doctors found a link between gout and meat.",
        "The valve makes a clicking sound.",
        "See your doctor if the toe turns blue.",
        "Genetic testing is available in many clinics.",
        "Visit the dentist twice a year.",
        "Ask for more information if you are unsure.",
        "Gout (see below) hurts.\n\n\n- a red toe",
    ],
)
def test_a_sentence_that_says_something_is_kept(text):
    assert apply("cut_link_sentences", text) == text


def test_the_full_stop_stays_when_the_aside_before_it_is_cut():
    assert apply("cut_link_sentences", "It hurts (See the section on Toes). Rest.") == "It hurts. Rest."
    assert apply("cut_link_sentences", "It hurts. (See the section on Toes). Rest.") == "It hurts. Rest."


def test_the_list_that_a_cut_sentence_announced_is_cut_too():
    text = "Gout hurts.\nSee the following PDQ summaries for more information:\n- Toes\n- Feet\n\nRest helps:\n- sleep"
    assert apply("cut_link_sentences", text) == "Gout hurts.\nRest helps:\n- sleep"


def test_a_long_flattened_list_is_kept_though_it_ends_in_a_link():
    text = "Treat it with " + "cold water " * 30 + "as shown by clicking here."
    assert apply("cut_link_sentences", text) == text


def test_lost_apostrophes_and_accents_are_restored_in_both_texts():
    text = "Dont worry, a persons bodys defence isnt lost in Sjgrens, Mnire's or Guillain-Barr syndrome."
    whole = "Don't worry, a person's body's defence isn't lost in Sjögren's, Ménière's or Guillain-Barré syndrome."
    assert apply("restore_letters", text) == whole
    assert clean([row("Yes.", "Is it Sjgren ?")], ["medquad.restore_letters"])[0][0]["prompt"] == "Is it Sjögren ?"


@pytest.mark.parametrize("text", ["Its doctors lets persons wait.", "Epstein-Barr virus", "A Cantonese dontist"])
def test_words_that_may_be_whole_are_left_alone(text):
    assert apply("restore_letters", text) == text


@pytest.mark.parametrize("text", ["Drink 1 ounces of it.", "A fever over 38.50 C is high.", "Above 101.30 F call."])
def test_damaged_quantities_are_dropped(text):
    assert apply("drop_damaged_quantities", text) is None


@pytest.mark.parametrize(
    "text", ["Drink 1 ounce of it.", "A fever over 38.5 C.", "Take 11 ounces.", "It cost 38.50 dollars."]
)
def test_whole_quantities_are_kept(text):
    assert apply("drop_damaged_quantities", text) == text


@pytest.mark.parametrize(
    ("template", "natural"),
    [
        ("What is (are) Gout ?", "What is Gout?"),
        ("What is (are) Kidney Stones ?", "What are Kidney Stones?"),
        ("What is (are) Kidney Stones (Adults) ?", "What are Kidney Stones (Adults)?"),
        ("What is (are) Dementia With Lewy Bodies ?", "What is Dementia With Lewy Bodies?"),
        ("What is (are) Mumps ?", "What is Mumps?"),
        ("How to diagnose Gout ?", "How is Gout diagnosed?"),
        ("How to prevent Gout ?", "How can Gout be prevented?"),
        ("What to do for Gout ?", "What should I know about Gout?"),
        ("Do you have information about Gout", "What can you tell me about Gout?"),
        ("what research (or clinical trials) is being done for Gout ?", "What research is being done on Gout?"),
        ("Who is at risk for Gout? ?", "Who is at risk for Gout?"),
        ("What causes What I need to know about Gout ?", "What causes Gout?"),
        ("how is gout treated?", "How is gout treated?"),
        ("Is Gout inherited ?", "Is Gout inherited?"),
    ],
)
def test_questions_are_asked_naturally(template, natural):
    asked = clean([row("Yes.", template)], ["medquad.ask_naturally"])[0]
    assert asked[0]["prompt"] == natural
    assert clean(asked, ["medquad.ask_naturally"])[0] == asked


def test_only_concepts_of_few_topics_are_kept_for_grouping():
    rows = [
        row("Yes.", index=index, umls_cui=f"C0|C{index + 1}", question_focus=f"Topic {index}") for index in range(3)
    ]
    rows += [row("Yes.", index=3, umls_cui="C0", question_focus="TOPIC 2"), row("Yes.", index=4, umls_cui=None)]
    kept = clean(rows, [{"medquad.keep_specific_cuis": {"max_topics": 2}}])[0]
    assert [one["umls_cui"] for one in kept] == [["C1"], ["C2"], ["C3"], [], None]
    assert clean(rows, [{"medquad.keep_specific_cuis": {"max_topics": 3}}])[0][3]["umls_cui"] == ["C0"]


def test_folding_ignores_case_form_punctuation_and_space():
    assert fold("\uff33jögren\u2019s  Syndrome\n(SS)!") == fold("sjo\u0308gren's syndrome: ss")
    assert fold("a b") != fold("ab")


def test_the_recipe_list_is_made_of_known_rules():
    assert [rule_problem(item) for item in NAMED_LISTS["medquad"]] == [None] * len(NAMED_LISTS["medquad"])


def test_the_recipe_list_cleans_an_invented_row():
    raw = row(
        f"What are the signs and symptoms of Toe rot? Toe rot doesnt spread to a persons foot.  {TABLE}",
        "What are the symptoms of Toe rot ?",
        document_source="GARD",
        question_focus="Toe rot",
    )
    (left,), _ = clean([raw], NAMED_LISTS["medquad"])
    assert left["prompt"] == "What are the symptoms of Toe rot?"
    assert left["completion"] == "Toe rot doesn't spread to a person's foot."
