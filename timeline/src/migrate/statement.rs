//! Which migrations cannot run in a transaction, told by their text. Pure.
//!
//! The text is cut into statements as psql does it (comments, quotes, dollar quotes, parentheses, `BEGIN ATOMIC` bodies of
//! functions); what a statement is, is told by its first words. Whatever is not recognised here, Postgres refuses by itself.

/// How a migration is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Manner {
    /// In one transaction with its record.
    Inside,
    /// Outside: it is one statement, of which can be found out afterwards whether it has run.
    Outside(Alone),
}

/// A statement that is run outside a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Alone {
    /// `CREATE INDEX CONCURRENTLY index ON table …`; names as SQL wants them.
    CreateIndex {
        /// The index, which lies in the table's schema.
        index: String,
        /// The table.
        table: String,
    },
    /// `DROP INDEX CONCURRENTLY index`.
    DropIndex {
        /// The index.
        index: String,
    },
    /// `VACUUM …`: running it again does no harm.
    Vacuum,
}

/// Why a migration cannot be run by a release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// What it has.
    pub what: String,
    /// What to do instead.
    pub advice: &'static str,
}

/// Tells how a migration is to be run.
///
/// # Errors
/// If it cannot be.
pub fn manner(sql: &str) -> Result<Manner, Unfit> {
    let statements = split(sql);
    let mut alone = None;
    for statement in &statements {
        if let Some(found) = look(statement)? {
            alone = Some((found, statement));
        }
    }
    match alone {
        None => Ok(Manner::Inside),
        Some((found, _)) if statements.len() == 1 => Ok(Manner::Outside(found)),
        Some((_, statement)) => Err(Unfit {
            what: format!("it has other statements besides one that cannot run in a transaction ({})", head(statement)),
            advice: "Put that statement into a migration of its own: it is then run, and recorded, by itself.",
        }),
    }
}

/// One word, name or sign of a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    /// Not quoted, in lower case.
    Word(String),
    /// A quoted name, with its quotes.
    Name(String),
    Sign(char),
    /// A string or number.
    Literal,
}

impl Token {
    fn is(&self, word: &str) -> bool {
        matches!(self, Token::Word(own) if own == word)
    }

    /// As SQL wants it, if it is a name.
    fn name(&self) -> Option<&str> {
        match self {
            Token::Word(name) | Token::Name(name) => Some(name),
            _ => None,
        }
    }
}

/// What a statement is, if it is not run as most are.
fn look(statement: &[Token]) -> Result<Option<Alone>, Unfit> {
    let unfit = |advice| Err(Unfit { what: format!("it has {}", head(statement)), advice });
    let words = |n: usize| statement.get(n).map_or("", |token| if let Token::Word(word) = token { word } else { "" });
    let has = |word: &str| statement.iter().any(|token| token.is(word));
    match (words(0), words(1)) {
        ("begin" | "commit" | "end" | "abort" | "start", _) | ("prepare", "transaction") => {
            unfit("Take it out: each migration is a transaction of its own.")
        }
        ("rollback", then) if then != "to" && !statement.iter().any(|token| token.is("to")) => {
            unfit("Take it out: each migration is a transaction of its own.")
        }
        ("create", "index" | "unique") if has("concurrently") => create_index(statement).map(Some),
        ("drop", "index") if words(2) == "concurrently" => {
            let rest = &statement[3..];
            let rest =
                if rest.first().is_some_and(|token| token.is("if")) { rest.get(2..).unwrap_or(&[]) } else { rest };
            let index: String = rest.iter().map_while(qualified).collect();
            match index.is_empty() {
                true => unfit("Name the index."),
                false => Ok(Some(Alone::DropIndex { index })),
            }
        }
        ("vacuum", _) => Ok(Some(Alone::Vacuum)),
        ("reindex", what) if has("concurrently") || ["database", "system"].contains(&what) => {
            unfit("Run it by hand (ebb psql): it mends what is there, and changes nothing that a release needs.")
        }
        ("cluster", "") => unfit("Name the table: CLUSTER of everything cannot run in a transaction."),
        ("alter", "table") if has("detach") && has("concurrently") => unfit(
            "Detach without CONCURRENTLY, within the lock timeout, or by hand (ebb psql): one that is interrupted needs \
             FINALIZE.",
        ),
        ("create" | "drop", "database" | "tablespace") | ("alter", "system") => {
            unfit("A release changes the database app of one branch; this is outside of it.")
        }
        ("alter", "database") if has("tablespace") => {
            unfit("A release changes the database app of one branch; this is outside of it.")
        }
        _ => Ok(None),
    }
}

fn create_index(statement: &[Token]) -> Result<Alone, Unfit> {
    let after = statement.iter().position(|token| token.is("concurrently")).map_or(&[][..], |at| &statement[at + 1..]);
    let rest = if after.first().is_some_and(|token| token.is("if")) { after.get(3..).unwrap_or(&[]) } else { after };
    let on = rest.iter().position(|token| token.is("on"));
    let index = match (rest.first().and_then(Token::name), on) {
        (Some(index), Some(1)) => index.to_owned(),
        _ => {
            return Err(Unfit {
                what: "it creates an index without a name concurrently".to_owned(),
                advice: "Name the index: else nobody can tell after a crash whether it is there.",
            });
        }
    };
    let rest = &rest[2..];
    let rest = if rest.first().is_some_and(|token| token.is("only")) { &rest[1..] } else { rest };
    let table = rest.iter().map_while(qualified).collect();
    Ok(Alone::CreateIndex { index, table })
}

/// A part of a name with its schema. Two names never follow one another, so that this ends with the name.
fn qualified(token: &Token) -> Option<&str> {
    match token {
        Token::Word(word) if ["using", "cascade", "restrict"].contains(&word.as_str()) => None,
        Token::Sign('.') => Some("."),
        token => token.name(),
    }
}

/// The first words of a statement, for people.
fn head(statement: &[Token]) -> String {
    let words = statement.iter().filter_map(|token| match token {
        Token::Word(word) => Some(word.to_uppercase()),
        _ => None,
    });
    words.take(3).collect::<Vec<_>>().join(" ")
}

/// Cuts a text into statements; empty ones are left out.
fn split(sql: &str) -> Vec<Vec<Token>> {
    let mut lexer = Lexer { rest: sql };
    let (mut statements, mut statement) = (Vec::new(), Vec::new());
    let (mut parentheses, mut bodies) = (0usize, 0usize);
    while let Some(token) = lexer.next() {
        match &token {
            Token::Sign('(') => parentheses += 1,
            Token::Sign(')') => parentheses = parentheses.saturating_sub(1),
            Token::Sign(';') if parentheses == 0 && bodies == 0 => {
                statements.push(std::mem::take(&mut statement));
                continue;
            }
            Token::Word(word) if makes_a_function(&statement) => match word.as_str() {
                "atomic" if statement.last().is_some_and(|last: &Token| last.is("begin")) => bodies = 1,
                "case" if bodies > 0 => bodies += 1,
                "end" => bodies = bodies.saturating_sub(1),
                _ => {}
            },
            _ => {}
        }
        statement.push(token);
    }
    statements.push(statement);
    statements.retain(|statement| !statement.is_empty());
    statements
}

fn makes_a_function(statement: &[Token]) -> bool {
    statement.first().is_some_and(|token| token.is("create"))
        && statement.iter().take(4).any(|token| token.is("function") || token.is("procedure"))
}

struct Lexer<'s> {
    rest: &'s str,
}

impl Lexer<'_> {
    fn next(&mut self) -> Option<Token> {
        self.skip_blanks();
        let first = self.rest.chars().next()?;
        if first == '"' {
            let end = self.quoted('"', false);
            return Some(Token::Name(self.take(end)));
        }
        if first == '\'' {
            let end = self.quoted('\'', false);
            self.take(end);
            return Some(Token::Literal);
        }
        if let Some(end) = self.dollar_quoted() {
            self.take(end);
            return Some(Token::Literal);
        }
        if first.is_alphabetic() || first == '_' {
            return Some(self.word());
        }
        if first.is_ascii_digit() {
            let end = self.rest.find(|c: char| !c.is_alphanumeric() && c != '.' && c != '_').unwrap_or(self.rest.len());
            self.take(end);
            return Some(Token::Literal);
        }
        self.take(first.len_utf8());
        Some(Token::Sign(first))
    }

    fn word(&mut self) -> Token {
        let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
        let end = self.rest.find(|c| !is_part(c)).unwrap_or(self.rest.len());
        let word = self.take(end).to_lowercase();
        // A string with backslashes: its prefix stands right before it.
        if self.rest.starts_with('\'') && ["e", "b", "x", "n", "u"].contains(&word.as_str()) {
            let end = self.quoted('\'', word == "e");
            self.take(end);
            return Token::Literal;
        }
        Token::Word(word)
    }

    /// Takes bytes off the front.
    fn take(&mut self, bytes: usize) -> String {
        let (taken, rest) = self.rest.split_at(bytes);
        self.rest = rest;
        taken.to_owned()
    }

    fn skip_blanks(&mut self) {
        loop {
            self.rest = self.rest.trim_start();
            if self.rest.starts_with("--") {
                self.rest = self.rest.split_once('\n').map_or("", |(_, rest)| rest);
            } else if self.rest.starts_with("/*") {
                self.rest = &self.rest[comment(self.rest)..];
            } else {
                return;
            }
        }
    }

    /// Where what begins with this quote ends; a doubled quote does not end it.
    fn quoted(&self, quote: char, backslashes: bool) -> usize {
        let mut chars = self.rest.char_indices().skip(1).peekable();
        while let Some((at, c)) = chars.next() {
            if backslashes && c == '\\' {
                chars.next();
            } else if c == quote {
                match chars.peek() {
                    Some((_, next)) if *next == quote => drop(chars.next()),
                    _ => return at + quote.len_utf8(),
                }
            }
        }
        self.rest.len()
    }

    /// Where `$tag$ … $tag$` ends, if that is what is next.
    fn dollar_quoted(&self) -> Option<usize> {
        let after = self.rest.strip_prefix('$')?;
        let tag = &after[..after.find('$')?];
        let is_tag =
            tag.chars().all(|c| c.is_alphanumeric() || c == '_') && !tag.starts_with(|c: char| c.is_ascii_digit());
        if !is_tag {
            return None;
        }
        let mark = &self.rest[..tag.len() + 2];
        let body = &self.rest[mark.len()..];
        Some(body.find(mark).map_or(self.rest.len(), |end| mark.len() + end + mark.len()))
    }
}

/// Where a comment ends; comments nest.
fn comment(text: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < text.len() {
        let rest = &text[at..];
        if rest.starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest.starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_run_in_a_transaction_does() {
        for sql in [
            "",
            "-- only a comment; commit",
            "create index on t (n); alter table t add c int",
            "insert into t values ('commit; vacuum', E'it\\'s; commit', $$ ; commit; $$, $x$ $$ ; vacuum $x$)",
            "/* vacuum; /* nested */ commit; */ select 1",
            "create function f() returns int language sql begin atomic select 1; select case when true then 1 end; end;",
            "create or replace procedure p() begin atomic insert into t values (1); end; select 1",
            "create rule r as on insert to t do (select 1; select 2)",
            "do $$ begin perform 1; end $$",
            "savepoint a; rollback to a; rollback to savepoint a; release a",
            "alter type mood add value 'glad'",
            "refresh materialized view concurrently v",
            "create table \"commit\" (\"vacuum\" int); select 1 as \"end\"",
            "create function f() returns trigger language plpgsql as 'begin return new; end'",
            "select $1, a$b from x",
        ] {
            assert_eq!(manner(sql), Ok(Manner::Inside), "for {sql:?}");
        }
    }

    #[test]
    fn a_statement_that_cannot_is_run_alone() {
        let check = |sql: &str, expect: Alone| assert_eq!(manner(sql), Ok(Manner::Outside(expect)), "for {sql:?}");
        let create = |index: &str, table: &str| Alone::CreateIndex { index: index.to_owned(), table: table.to_owned() };
        let drop = |index: &str| Alone::DropIndex { index: index.to_owned() };
        check("create index concurrently i on t (n);", create("i", "t"));
        check("CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS I ON ONLY s.T USING btree (n)", create("i", "s.t"));
        check(
            "create index concurrently \"I x\" on \"S\".\"t\"\"t\" (n) -- why",
            create("\"I x\"", "\"S\".\"t\"\"t\""),
        );
        check("drop index concurrently if exists s.i", drop("s.i"));
        check("drop index concurrently \"i\" cascade", drop("\"i\""));
        check("vacuum (analyze) t", Alone::Vacuum);
    }

    #[test]
    fn what_a_release_cannot_run_is_refused_with_advice() {
        for sql in [
            "begin; select 1; commit",
            "commit and chain",
            "rollback",
            "start transaction",
            "create index concurrently on t (n)",
            "create index concurrently i on t (n); select 1",
            "vacuum; vacuum",
            "reindex table concurrently t",
            "reindex (verbose) index concurrently i",
            "reindex database app",
            "cluster",
            "alter table t detach partition p concurrently",
            "create database x",
            "drop tablespace x",
            "alter system set work_mem = 1",
        ] {
            let unfit = manner(sql).expect_err(sql);
            assert!(!unfit.advice.is_empty() && unfit.what.starts_with("it "), "{unfit:?}");
        }
    }
}
