//! What a client may ask of the proxy itself, by settings named `ebb.…` in its start-up packet. They are taken out of it:
//! Postgres never sees them.
//!
//! | setting | meaning | default |
//! |---|---|---|
//! | `ebb.notice` | a `NOTICE` where a wait becomes long | on |
//! | `ebb.pings` | while the session sleeps, the proxy itself answers `SELECT 1` | the proxy's `answer_pings` |
//!
//! They are given as `options=-c ebb.notice=off`, or as parameters of the start-up packet, where a driver allows that.

use crate::errors::Said;
use crate::startup::{Startup, option_words, unescaped};

/// What one client wishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wishes {
    /// To be told when it has waited for long.
    pub notice: bool,
    /// `SELECT 1` to be answered without a wake.
    pub pings: bool,
}

impl Wishes {
    /// Takes the wishes out of a start-up packet.
    ///
    /// # Errors
    /// If one is neither on nor off.
    pub fn take(startup: &mut Startup, pings: bool) -> Result<Self, Said> {
        let notice = take_switch(startup, "ebb.notice")?.unwrap_or(true);
        let pings = take_switch(startup, "ebb.pings")?.unwrap_or(pings);
        Ok(Self { notice, pings })
    }
}

fn take_switch(startup: &mut Startup, name: &str) -> Result<Option<bool>, Said> {
    let as_parameter = startup.text(name).map(str::to_owned);
    if as_parameter.is_some() {
        startup.set(name, None);
    }
    let value = take_option(startup, name).or(as_parameter);
    value.map(|value| parse(&value).ok_or_else(|| Said::not_a_switch(name, &value))).transpose()
}

/// `-c name=value`, `-cname=value` and `--name=value`, as Postgres reads them; the last one wins.
fn take_option(startup: &mut Startup, name: &str) -> Option<String> {
    let options = startup.text("options")?.to_owned();
    let (mut kept, mut found) = (Vec::new(), None);
    let mut words = option_words(&options).peekable();
    while let Some(word) = words.next() {
        let (setting, words_of_it) = match (word, words.peek()) {
            ("-c", Some(next)) => (*next, 2),
            _ => (word.strip_prefix("--").or_else(|| word.strip_prefix("-c")).unwrap_or_default(), 1),
        };
        let setting = unescaped(setting);
        match setting.split_once('=').filter(|(key, _)| key.eq_ignore_ascii_case(name)) {
            Some((_, value)) => {
                found = Some(value.to_owned());
                if words_of_it == 2 {
                    words.next();
                }
            }
            None => kept.push(word),
        }
    }
    if found.is_some() {
        startup.set("options", Some(kept.join(" ")).filter(|rest| !rest.is_empty()));
    }
    found
}

fn parse(value: &str) -> Option<bool> {
    match value.to_ascii_lowercase().as_str() {
        "on" | "true" | "yes" | "1" => Some(true),
        "off" | "false" | "no" | "0" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is expected: the wishes `notice` and `pings`, and what is left of `options`.
    fn check(options: Option<&str>, parameter: Option<(&str, &str)>, expect: Option<((bool, bool), Option<&str>)>) {
        let mut startup = Startup::default();
        startup.set("options", options.map(str::to_owned));
        if let Some((name, value)) = parameter {
            startup.set(name, Some(value.to_owned()));
        }
        let wishes = Wishes::take(&mut startup, false).ok().map(|wishes| (wishes.notice, wishes.pings));
        assert_eq!(wishes, expect.map(|(wishes, _)| wishes), "for {options:?} {parameter:?}");
        if let Some((_, left)) = expect {
            assert_eq!(startup.text("options"), left, "for {options:?}");
            assert_eq!(startup.text("ebb.notice").or(startup.text("ebb.pings")), None);
        }
    }

    #[test]
    fn wishes_are_taken_out_and_the_rest_is_left() {
        check(None, None, Some(((true, false), None)));
        check(Some("-c ebb.notice=off"), None, Some(((false, false), None)));
        check(Some("-c work_mem=5MB -cebb.pings=on --ebb.notice=NO -c a.b=c\\ d"), None, {
            Some(((false, true), Some("-c work_mem=5MB -c a.b=c\\ d")))
        });
        check(Some("-c ebb.notice=off -c ebb.notice=on"), None, Some(((true, false), None)));
        check(None, Some(("ebb.pings", "true")), Some(((true, true), None)));
        check(Some("-c ebb.other=1 -c"), None, Some(((true, false), Some("-c ebb.other=1 -c"))));
    }

    #[test]
    fn a_wish_that_is_neither_on_nor_off_is_refused() {
        check(Some("-c ebb.notice=maybe"), None, None);
        check(None, Some(("ebb.pings", "")), None);
    }
}
