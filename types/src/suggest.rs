//! "Did you mean …": the nearest of the names that exist.

/// LIMIT: more than three suggestions are a list, not a hint.
const SUGGESTIONS_MAX: usize = 3;

/// The candidates nearest to a mistyped name, best first: at most three, and none that is not close.
pub fn nearest<'a>(wanted: &str, candidates: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let close_enough = (wanted.chars().count() / 3).clamp(1, 3);
    let mut scored: Vec<_> = candidates
        .into_iter()
        .filter_map(|candidate| {
            let distance = strsim::damerau_levenshtein(wanted, candidate);
            let extends = candidate.starts_with(wanted) || wanted.starts_with(candidate);
            (distance <= close_enough || extends).then_some((distance, candidate))
        })
        .collect();
    scored.sort_unstable();
    scored.truncate(SUGGESTIONS_MAX);
    scored.into_iter().map(|(_, candidate)| candidate).collect()
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn near_names_come_best_first_and_far_ones_not_at_all() {
        let names = ["prod", "dev", "pr-42", "staging"];
        assert_eq!(nearest("prdo", names), ["prod"]);
        assert_eq!(nearest("stag", names), ["staging"]);
        assert!(nearest("zebra", names).is_empty());
    }
}
