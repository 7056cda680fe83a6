"""Which pairs may be compared, over which ids, and where their texts end."""

import pytest
from tiny import EOS, byte_tokenizer, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from skd_trl.data.vocabulary import (
    check_vocabularies,
    describe_end_of_sequence_difference,
    describe_tokenizer_difference,
    end_of_sequence_ids,
    shared_vocab_size,
)


def word_tokenizer(words: list[str], split_digits: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="?"))
    whitespace = pre_tokenizers.Whitespace()
    digits = pre_tokenizers.Sequence([whitespace, pre_tokenizers.Digits(individual_digits=True)])
    backend.pre_tokenizer = digits if split_digits else whitespace
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


def merging_tokenizer(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """One vocabulary, other merges: `merges` decide how "The" is put together."""
    vocabulary = {token: i for i, token in enumerate(["?", "T", "h", "e", "Th", "he", "The"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


def pair(student_size: int = 259, teacher_size: int = 259):
    return tiny_model(vocab_size=student_size), tiny_model(seed=1, vocab_size=teacher_size)


@pytest.mark.parametrize(
    ("sizes", "shared"), [((259, 259), 259), ((264, 272), 264), ((272, 264), 264)], ids=["equal", "smaller", "larger"]
)
def test_padded_heads_over_one_tokenizer_share_the_smaller_range(sizes, shared):
    assert shared_vocab_size(*pair(*sizes)) == shared
    assert check_vocabularies(*pair(*sizes), byte_tokenizer(), byte_tokenizer()) is None


def test_tokenizers_with_other_ids_are_refused_with_the_first_difference_and_the_way_out():
    tokenizer, other = word_tokenizer(["?", "a", "b", "c"]), word_tokenizer(["?", "a", "c", "b"])
    with pytest.raises(ValueError, match="id 2 is 'b' for the student and 'c' for the teacher.*GOLDTrainer"):
        check_vocabularies(*pair(), tokenizer, other)


def test_other_tokenizers_are_named_as_the_reason_even_where_the_sizes_differ_too():
    with pytest.raises(ValueError, match="different tokenizers: id 0"):
        check_vocabularies(*pair(259, 64), byte_tokenizer(), word_tokenizer(["?", "a", "b", "c"]))


def test_one_vocabulary_with_other_merges_is_another_tokenizer():
    left = merging_tokenizer([("T", "h"), ("Th", "e"), ("h", "e")])
    right = merging_tokenizer([("h", "e"), ("T", "h"), ("Th", "e")])
    assert left.get_vocab() == right.get_vocab()
    assert "split" in describe_tokenizer_difference(left, right)
    assert describe_tokenizer_difference(left, left) is None


def test_one_vocabulary_with_another_pre_tokenizer_is_another_tokenizer():
    digits = ["?", *"0123456789", "12"]
    left, right = word_tokenizer(digits), word_tokenizer(digits, split_digits=True)
    for tokenizer in (left, right):
        tokenizer.backend_tokenizer.model = models.BPE(
            vocab={word: i for i, word in enumerate(digits)}, merges=[("1", "2")], unk_token="?"
        )
    assert left.get_vocab() == right.get_vocab()
    assert "1234567.89" in describe_tokenizer_difference(left, right)


def test_a_token_that_moved_to_an_unused_id_is_a_difference():
    left, right = byte_tokenizer(), byte_tokenizer()
    left.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    right.add_special_tokens({"additional_special_tokens": ["<c>", "<d>", "<a>"]})
    assert "'<a>' for the student and '<c>' for the teacher" in describe_tokenizer_difference(left, right)


def test_tokens_that_only_the_teacher_has_at_unused_ids_are_doubtful():
    doubt = check_vocabularies(*pair(272, 272), byte_tokenizer(), byte_tokenizer(num_extra_tokens=2))
    assert "'<|extra_0|>', '<|extra_1|>'" in doubt


def test_tokens_of_the_student_that_the_teachers_head_lacks_are_refused():
    with pytest.raises(ValueError, match=r"2 tokens that the teacher lacks \(first: id 259, '<\|extra_0\|>'"):
        check_vocabularies(*pair(261, 259), byte_tokenizer(num_extra_tokens=2), byte_tokenizer())


def test_tokens_beyond_the_students_own_head_do_not_count():
    # Gemma 3: the tokenizer's image token is beyond the text-only student's head, not beyond the teacher's.
    tokenizer = byte_tokenizer(num_extra_tokens=1)
    assert check_vocabularies(*pair(259, 264), tokenizer, tokenizer) is None


@pytest.mark.parametrize("sizes", [(259, 259), (259, 264), (264, 259)])
def test_without_a_tokenizer_of_the_teacher_the_sizes_decide_and_the_doubt_says_so(sizes):
    assert "not verified" in check_vocabularies(*pair(*sizes), byte_tokenizer())


def test_without_a_tokenizer_of_the_teacher_a_head_below_the_students_ids_is_refused():
    with pytest.raises(ValueError, match="entries, the teacher's 200.*59 tokens that the teacher lacks"):
        check_vocabularies(*pair(259, 200), byte_tokenizer())


def test_the_teachers_tokenizer_is_read_from_where_the_teacher_was_loaded(tmp_path):
    student, teacher = pair()
    word_tokenizer(["?", "a", "b", "c"]).save_pretrained(tmp_path)
    teacher.config._name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="different tokenizers"):
        check_vocabularies(student, teacher, byte_tokenizer())
    byte_tokenizer().save_pretrained(tmp_path)
    assert check_vocabularies(student, teacher, byte_tokenizer()) is None


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2", "cohere"])
def test_a_teacher_folder_without_a_tokenizer_counts_as_none_found(architecture, tmp_path):
    student, teacher = tiny_model(), tiny_model(architecture)
    teacher.save_pretrained(tmp_path)
    teacher.config._name_or_path = str(tmp_path)
    assert "not verified" in check_vocabularies(student, teacher, byte_tokenizer())


def test_end_ids_are_the_union_of_both_models_and_the_tokenizer():
    student, teacher = pair()
    tokenizer = byte_tokenizer()
    assert end_of_sequence_ids(student, teacher, tokenizer) == [tokenizer.eos_token_id]
    student.generation_config = GenerationConfig(eos_token_id=7)
    teacher.generation_config = GenerationConfig(eos_token_id=[9, 8])
    teacher.config.eos_token_id = 3
    student.config.eos_token_id = -1
    assert end_of_sequence_ids(student, teacher, tokenizer) == [3, 7, 8, 9, tokenizer.eos_token_id]
    student.generation_config = None
    assert end_of_sequence_ids(student, teacher, tokenizer) == [3, 8, 9, tokenizer.eos_token_id]


def test_a_difference_in_end_ids_names_the_tokens_of_each_side():
    student, teacher = pair()
    tokenizer = byte_tokenizer()
    student.config.eos_token_id, teacher.config.eos_token_id = [tokenizer.eos_token_id, 256], [256, 258]
    message = describe_end_of_sequence_difference(student, teacher, tokenizer)
    assert (
        f"only the student with 257 ('{EOS}')" in message and "only the teacher with 258 ('<|im_start|>')" in message
    )


@pytest.mark.parametrize("ids", [(None, 5), (5, None), (5, [5]), ([5, 6], [6, 5])])
def test_models_with_the_same_end_ids_or_none_do_not_differ(ids):
    student, teacher = pair()
    student.config.eos_token_id, teacher.config.eos_token_id = ids
    assert describe_end_of_sequence_difference(student, teacher, byte_tokenizer()) is None
