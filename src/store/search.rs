//! A text as the index has it, what a search looks for, and how well a pair matches. Knows words and FTS5's queries, no database.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::BTreeSet;

use unicode_properties::{GeneralCategory, GeneralCategoryGroup, UnicodeGeneralCategory};

use crate::exchange::Pair;

/// So many words of a query count.
const MOST_WORDS: usize = 32;
/// And so many of its bytes, since FTS5 may see several words where we see one.
const MOST_QUERY: usize = 512;
/// So many words that punctuation divides must have their parts side by side. For each, FTS5 looks into all pairs that have
/// its parts.
const MOST_PHRASES: usize = 4;

/// A text as it is searched and indexed: with a full stop for each emoji and other symbol, without the points of Arabic and
/// Hebrew, which most texts lack. FTS5 takes symbols for letters that are newer than its table of them, of 2010, and `thanks🤖`
/// for a word. What begins at U+2000 has no accents.
pub fn plain(text: &str) -> Cow<'_, str> {
    let is_symbol = |c: char| c >= '\u{2000}' && !c.is_alphanumeric() && !c.is_whitespace();
    if !text.contains(|c| is_symbol(c) || is_point(c)) {
        return text.into();
    }
    text.chars().filter(|c| !is_point(*c)).map(|c| if is_symbol(c) { '.' } else { c }).collect()
}

/// Hebrew points, the Arabic letter mark, tatweel, and Arabic points.
fn is_point(c: char) -> bool {
    matches!(
        c,
        '\u{591}'..='\u{5bd}' | '\u{5bf}' | '\u{5c1}' | '\u{5c2}' | '\u{5c4}' | '\u{5c5}' | '\u{5c7}' | '\u{61c}' | '\u{640}'
            | '\u{64b}'..='\u{65f}' | '\u{670}'
    )
}

/// What words are made of to the index; see the last of its migrations.
fn is_letter(c: char) -> bool {
    use GeneralCategory::{NonspacingMark, SpacingMark};
    use GeneralCategoryGroup::{Letter, Number};
    if c.is_ascii() {
        return c.is_ascii_alphanumeric();
    }
    matches!(c.general_category_group(), Letter | Number) || matches!(c.general_category(), NonspacingMark | SpacingMark)
}

/// The words of a query, each once, as far as they count: a search costs words times text.
pub fn wanted(text: &str) -> Vec<&str> {
    let (mut count, mut start, mut inside) = (0, 0, false);
    // What punctuation divides counts in parts, since FTS5 looks for each. Half a word would find nothing.
    let too_much = text.char_indices().any(|(at, c)| {
        if is_letter(c) && !inside {
            (count, start) = (count + 1, at);
        }
        inside = is_letter(c);
        count > MOST_WORDS || inside && at >= MOST_QUERY
    });
    let text = if too_much { &text[..start] } else { text };
    let mut words: Vec<&str> = Vec::new();
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()) {
        if word.contains(char::is_alphanumeric) && !words.iter().any(|known| known.eq_ignore_ascii_case(word)) {
            words.push(word);
        }
    }
    words
}

/// Any words as an FTS5 query: in quotes, all of them needed, but for those that are no word to FTS5; it splits them
/// further itself, and what it splits is a phrase. `None` where there are no words
/// (<https://sqlite.org/fts5.html#full_text_query_syntax>).
pub fn match_expression(words: &[&str]) -> Option<String> {
    if words.is_empty() {
        return None;
    }
    let (mut phrases, mut terms) = (0, Vec::new());
    for word in words {
        phrases += usize::from(parts(word).nth(1).is_some());
        if phrases > MOST_PHRASES { terms.extend(parts(word)) } else { terms.push(*word) }
    }
    let words: Vec<String> = terms.iter().map(|w| format!("\"{}\"", w.replace('"', "\"\""))).collect();
    Some(format!("{{question answer}} : ({})", words.join(" ")))
}

/// The same among a key's own rows.
pub fn among_own(key: &str, query: &str) -> String {
    let key: String = key.bytes().map(|b| format!("{b:02X}")).collect();
    format!("key : \"{key}\" AND {query}")
}

/// Sorts the pairs that were found by how well they match, the best first; of equal ones the newest.
pub fn rank(found: &mut [Pair], words: &[&str]) {
    // Each once: it costs a look through all texts.
    let words: BTreeSet<String> = words.iter().flat_map(|words| parts(words)).map(str::to_lowercase).collect();
    found.sort_by_cached_key(|pair| Reverse((score(pair, &words), pair.id)));
}

/// How well a pair matches, in thousandths: the occurrences of the words against the length of the text,
/// as BM25 weighs them. FTS5's own bm25() counts the matches in the whole history first.
fn score(pair: &Pair, words: &BTreeSet<String>) -> u64 {
    let text = plain(&format!("{} {}", pair.question, pair.answer)).to_lowercase();
    let length = text.len() as f64 / 500.0;
    let weights = words.iter().map(|word| {
        let count = occurrences(&text, word) as f64;
        count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length))
    });
    (weights.sum::<f64>() * 1000.0) as u64
}

/// What the index takes for words.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !is_letter(c)).filter(|word| !word.is_empty())
}

/// How often a word stands in a text as a whole, as the index has it: not within another one.
fn occurrences(text: &str, word: &str) -> usize {
    let is_whole = |(at, _): &(usize, &str)| !text[..*at].ends_with(is_letter) && !text[at + word.len()..].starts_with(is_letter);
    text.match_indices(word).filter(is_whole).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_is_a_query_for_words() {
        let query = |text: &str| match_expression(&wanted(text));
        let found = query("\"x\" OR -z\0don't & or 🦀");
        assert_eq!(found.as_deref(), Some(r#"{question answer} : ("""x""" "OR" "-z" "don't")"#));
        assert_eq!(query(" \"'*🦀"), None);
        assert_eq!(
            query("a-1 b-1 c-1 d-1 e, f-1 -"),
            Some(r#"{question answer} : ("a-1" "b-1" "c-1" "d-1" "e," "f" "1")"#.to_string())
        );
        assert_eq!(among_own("a", "x"), r#"key : "61" AND x"#);
    }

    #[test]
    fn symbols_are_no_letters_and_points_are_nothing() {
        assert_eq!(plain("thanks🤖 don’t 100₽ ❤️ «né» 猫々\u{3000}½"), "thanks. don.t 100. .. «né» 猫々\u{3000}½");
        assert_eq!(plain("شكراً \u{61c}12 שָׁלוֹם דִּינִי־טוֹב"), "شكرا 12 שלום דיני־טוב");
        assert!(matches!(plain("naïve don't दिन"), Cow::Borrowed(_)));
    }

    #[test]
    fn words_within_others_do_not_count() {
        assert_eq!(occurrences("cat concatenate cats: cat, (cat)", "cat"), 3);
        assert_eq!(occurrences("кот кота кот", "кот"), 2);
        assert_eq!(parts("(Rust)? don't").collect::<Vec<_>>(), ["Rust", "don", "t"]);
        assert_eq!(parts("ק״ג a។b c·d e฿f हिन्दी").collect::<Vec<_>>(), ["ק", "ג", "a", "b", "c", "d", "e", "f", "हिन्दी"]);
    }

    #[test]
    fn the_order_of_what_was_found_knows_no_case_and_no_points_and_of_equals_the_newest_is_first() {
        let ranked = |query: &str, answers: &[&str]| -> Vec<i64> {
            let pair = |(id, answer): (i64, &&str)| Pair { id, answer: answer.to_string(), ..Pair::default() };
            let mut found: Vec<Pair> = (1..).zip(answers).map(pair).collect();
            rank(&mut found, &wanted(query));
            found.iter().map(|pair| pair.id).collect()
        };
        assert_eq!(ranked("cat", &["a cat", "a cat", "a cat"]), [3, 2, 1]);
        assert_eq!(ranked("CAT", &["Cat, cat", "one cat!"]), [1, 2]);
        assert_eq!(ranked("شكرا", &["شكراً شكراً", "شكرا 12"]), [1, 2]);
        assert_eq!(ranked("हिन्दी", &["हिन्दी हिन्दी", "हिन्दी ह"]), [1, 2]);
        assert_eq!(ranked("a-a-a-b", &["b b", "a a"]), [2, 1], "each of the words counts once");
    }

    #[test]
    fn of_a_query_32_words_count_and_512_bytes() {
        let words: Vec<String> = (0..40).map(|number| format!("w{number}")).collect();
        assert_eq!(wanted(&words.join(" ")), words[..32]);
        assert_eq!(wanted(&words.join("-")), [words[..32].join("-") + "-"], "the parts of a word, too");
        assert_eq!(wanted(&"x".repeat(512)), ["x".repeat(512)]);
        assert_eq!(wanted(&"x".repeat(513)), [""; 0]);
        assert_eq!(wanted(&format!("whole {} half", "é".repeat(252))), ["whole".to_string(), "é".repeat(252)]);
        assert_eq!(wanted(&format!("{0}blank{0}", " ".repeat(500))), ["blank"]);
        assert_eq!(wanted("विद्यार्थी ".repeat(20).trim()), ["विद्यार्थी"], "which are 600 bytes");
        assert_eq!(wanted(&"བཀྲ་ཤིས་".repeat(40)), ["བཀྲ་ཤིས་".repeat(16)], "32 syllables");
        assert_eq!(wanted(&format!("{} हिन्दी", "हि".repeat(84))), ["हि".repeat(84)], "no half a word");
    }
}
