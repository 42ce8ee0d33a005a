//! The rule of what is kept, against what it is for.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn kept(schedule: Schedule, made: &[i64]) -> BTreeSet<i64> {
    let times: Vec<_> = made.iter().copied().map(at).collect();
    made.iter().zip(schedule.keeps(&times)).filter(|(_, keep)| *keep).map(|(time, _)| *time).collect()
}

#[test]
fn a_schedule_is_read_as_it_is_written() {
    for text in ["hourly=24,daily=7,weekly=4", "daily=1", "hourly=2,weekly=9", "off"] {
        assert_eq!(text.parse::<Schedule>().unwrap().to_string(), text);
    }
    assert_eq!("daily=0".parse::<Schedule>().unwrap(), Schedule::default());
    for bad in ["", "hourly", "hourly=x", "monthly=3", "hourly=1;daily=1", "hourly=1001", "daily=-1"] {
        assert!(bad.parse::<Schedule>().is_err(), "{bad:?} was taken");
    }
}

#[test]
fn the_newest_of_each_hour_day_and_week_stay() {
    let monday: i64 = at(FIRST_MONDAY + 52 * 7 * DAY).as_second();
    let hour = |day: i64, hour: i64| monday + day * DAY + hour * HOUR;
    let made =
        [hour(-9, 5), hour(-8, 5), hour(-1, 22), hour(-1, 23), hour(0, 8), hour(0, 9), hour(0, 9) + 60, hour(0, 10)];
    let check = |text: &str, expect: &[i64]| {
        assert_eq!(kept(text.parse().unwrap(), &made), expect.iter().copied().collect(), "for {text}");
    };
    check("hourly=3", &[hour(0, 8), hour(0, 9) + 60, hour(0, 10)]);
    check("hourly=3,daily=2", &[hour(-1, 23), hour(0, 8), hour(0, 9) + 60, hour(0, 10)]);
    check("daily=3", &[hour(-8, 5), hour(-1, 23), hour(0, 10)]);
    check("weekly=2", &[hour(-1, 23), hour(0, 10)]);
    check("weekly=3", &[hour(-8, 5), hour(-1, 23), hour(0, 10)]);
    check("off", &made);
}

#[test]
fn one_is_due_in_each_period_however_many_were_missed() {
    let schedule: Schedule = "daily=7".parse().unwrap();
    let noon = 20_000 * DAY + 12 * HOUR;
    assert!(schedule.is_due(None, at(noon)));
    assert!(!schedule.is_due(Some(at(noon - HOUR)), at(noon)));
    assert!(schedule.is_due(Some(at(noon - DAY)), at(noon)));
    assert!(schedule.is_due(Some(at(noon - 90 * DAY)), at(noon)));
    assert!(!schedule.is_due(Some(at(noon + 3 * DAY)), at(noon)), "the clock was set back");
    assert!(!Schedule::default().is_due(None, at(noon)));
}

#[test]
fn a_failed_drill_is_tried_again_sooner() {
    let mut upkeep = Upkeep::default();
    assert!(!upkeep.drill_is_due(None, at(0)));
    upkeep.change(&UpkeepChange { drill_every_ms: Some(24 * 3_600_000), ..UpkeepChange::default() });
    assert!(upkeep.drill_is_due(None, at(0)));
    assert!(!upkeep.drill_is_due(Some((at(0), false)), at(DAY - 1)));
    assert!(upkeep.drill_is_due(Some((at(0), false)), at(DAY)));
    assert!(upkeep.drill_is_due(Some((at(0), true)), at(HOUR)));
    upkeep.change(&UpkeepChange { drill_every_ms: Some(0), ..UpkeepChange::default() });
    assert!(!upkeep.drill_is_due(None, at(0)));
}

fn schedules() -> impl Strategy<Value = Schedule> {
    (0..30u32, 0..10u32, 0..6u32).prop_map(|(hourly, daily, weekly)| Schedule { hourly, daily, weekly })
}

/// Moments within a quarter of a year, close together and far apart.
fn moments() -> impl Strategy<Value = Vec<i64>> {
    let gap = prop_oneof![1..90i64, 600..2 * HOUR, HOUR..DAY, DAY..20 * DAY];
    prop::collection::vec(gap, 0..120).prop_map(|gaps| {
        let begin = 20_000 * DAY;
        gaps.iter().scan(begin, |time, gap| Some(std::mem::replace(time, *time + gap))).collect()
    })
}

/// The newest of each period, newest period first.
fn newest_of_each(made: &[i64], length: i64, begin: i64) -> Vec<i64> {
    let mut newest = BTreeMap::new();
    for &time in made {
        let of = newest.entry((time - begin).div_euclid(length)).or_insert(time);
        *of = time.max(*of);
    }
    newest.into_values().rev().collect()
}

proptest! {
    /// A failure prints the case; `PROPTEST_RNG_SEED` replays a run.
    #[test]
    fn each_class_has_its_newest_and_nothing_else_stays(schedule in schedules(), made in moments()) {
        let mut expect = BTreeSet::new();
        for (_, length, begin, keep) in schedule.classes() {
            expect.extend(newest_of_each(&made, length, begin).into_iter().take(keep as usize));
        }
        if schedule.is_off() {
            expect.extend(&made);
        }
        prop_assert_eq!(kept(schedule, &made), expect);
    }

    #[test]
    fn how_often_it_is_looked_makes_no_difference(schedule in schedules(), made in moments(), looks in prop::collection::vec(any::<bool>(), 120)) {
        let mut there: Vec<i64> = Vec::new();
        for (time, look) in made.iter().zip(&looks) {
            there.push(*time);
            if *look {
                there = kept(schedule, &there).into_iter().collect();
            }
        }
        prop_assert_eq!(kept(schedule, &there), kept(schedule, &made));
    }

    #[test]
    fn what_the_schedule_itself_makes_is_bounded_and_begins_with_the_newest(schedule in schedules(), asked in moments()) {
        let mut there: Vec<i64> = Vec::new();
        for now in asked {
            if schedule.is_due(there.last().copied().map(at), at(now)) {
                there.push(now);
                there = kept(schedule, &there).into_iter().collect();
                prop_assert_eq!(there.last(), Some(&now));
                prop_assert!(there.len() as u32 <= schedule.hourly + schedule.daily + schedule.weekly);
            }
        }
        prop_assert!(!schedule.is_off() || there.is_empty());
    }
}
