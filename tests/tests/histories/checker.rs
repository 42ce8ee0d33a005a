//! Decides whether what clients saw of lists that are only appended to was one history. Pure.
//!
//! Each list is one row, so Postgres orders its appends, and in the end that order is known. A read is right if it is a
//! beginning of it, and holds all that was acknowledged before the read began.

use std::collections::{BTreeMap, HashMap, HashSet};

/// A value appended to a list; each value is appended once, at most.
#[derive(Debug, Clone)]
pub struct Append {
    pub list: i64,
    pub value: i64,
    /// When it was sent, in microseconds of the run.
    pub begun: u64,
    /// When its success came back; `None`: nobody knows whether it took effect.
    pub acknowledged: Option<u64>,
}

/// A list as it was read.
#[derive(Debug, Clone)]
pub struct Read {
    pub list: i64,
    pub values: Vec<i64>,
    /// When it was sent.
    pub begun: u64,
}

/// All faults of a history, in words.
pub fn check(appends: &[Append], reads: &[Read], finals: &BTreeMap<i64, Vec<i64>>) -> Vec<String> {
    let mut faults = Vec::new();
    let sent: HashMap<i64, &Append> = appends.iter().map(|append| (append.value, append)).collect();
    let mut place: HashMap<i64, usize> = HashMap::new();
    for (list, values) in finals {
        let mut seen = HashSet::new();
        for (at, value) in values.iter().enumerate() {
            if !seen.insert(value) {
                faults.push(format!("list {list} has {value} twice"));
            }
            if sent.get(value).is_none_or(|append| append.list != *list) {
                faults.push(format!("list {list} has {value}, which nobody appended to it"));
            }
            place.insert(*value, at);
        }
    }
    for append in appends.iter().filter(|append| append.acknowledged.is_some()) {
        if !place.contains_key(&append.value) {
            faults.push(format!("lost: {append:?}"));
        }
    }
    for read in reads {
        let whole = finals.get(&read.list).map_or(&[][..], Vec::as_slice);
        if !whole.starts_with(&read.values) {
            let at = read.values.iter().zip(whole).take_while(|(one, other)| one == other).count();
            faults.push(format!("list {} was read with another history from its value {at} on: {read:?}", read.list));
        }
    }
    faults.extend(stale(appends, reads));
    faults.extend(turned_round(appends, &place));
    faults
}

/// Reads that lack what was acknowledged before they began.
fn stale(appends: &[Append], reads: &[Read]) -> Vec<String> {
    let mut faults = Vec::new();
    for read in reads {
        let had: HashSet<i64> = read.values.iter().copied().collect();
        let before =
            |append: &&Append| append.list == read.list && append.acknowledged.is_some_and(|at| at < read.begun);
        for append in appends.iter().filter(before).filter(|append| !had.contains(&append.value)) {
            faults.push(format!("a read at {} of list {} lacks {append:?}", read.begun, read.list));
        }
    }
    faults
}

/// Appends that come after one that was sent when they were acknowledged already.
fn turned_round(appends: &[Append], place: &HashMap<i64, usize>) -> Vec<String> {
    let mut faults = Vec::new();
    let mut lists: BTreeMap<i64, Vec<&Append>> = BTreeMap::new();
    for append in appends.iter().filter(|append| place.contains_key(&append.value)) {
        lists.entry(append.list).or_default().push(append);
    }
    for of_list in lists.values_mut() {
        of_list.sort_by_key(|append| place[&append.value]);
        // The latest sending of all before each.
        let mut latest: Option<&Append> = None;
        for append in of_list {
            if let (Some(latest), Some(acknowledged)) = (latest, append.acknowledged)
                && acknowledged < latest.begun
            {
                faults.push(format!("{append:?} comes after {latest:?}"));
            }
            if latest.is_none_or(|latest| latest.begun < append.begun) {
                latest = Some(append);
            }
        }
    }
    faults
}

#[test]
fn the_checker_finds_what_is_wrong() {
    let append = |value, begun, acknowledged| Append { list: 1, value, begun, acknowledged };
    let read = |begun, values: &[i64]| Read { list: 1, values: values.to_vec(), begun };
    let appends = [append(1, 0, Some(5)), append(2, 6, None), append(3, 7, Some(9)), append(4, 10, None)];
    let check = |reads: &[Read], last: &[i64]| check(&appends, reads, &BTreeMap::from([(1, last.to_vec())])).len();
    assert_eq!(check(&[read(0, &[]), read(6, &[1]), read(10, &[1, 2, 3])], &[1, 2, 3]), 0);
    assert_eq!(check(&[read(8, &[1])], &[1, 3, 2]), 0, "what nobody acknowledged may come late, or never");
    assert_eq!(check(&[], &[1, 2]), 1, "lost");
    assert_eq!(check(&[], &[1, 3, 3]), 1, "twice");
    assert_eq!(check(&[], &[1, 3, 9]), 1, "made up");
    assert_eq!(check(&[read(8, &[1, 2])], &[1, 3]), 1, "another history");
    assert_eq!(check(&[read(6, &[])], &[1, 3]), 1, "stale");
    assert_eq!(check(&[], &[3, 1]), 1, "turned round");
}
