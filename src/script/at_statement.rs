//! Lets a statement begin with a block: `at("")["w"] = tensor;`.
//!
//! Rhai assigns to an index only below a variable. A statement's leading `at(..)` is therefore
//! read as `at[..]`: the same block, reached through the reserved variable `at`.

use std::cell::RefCell;

use rhai::{Engine, FuncRegistration, Token};

use super::definitions::Definitions;
use super::values::Block;

/// The value of the reserved variable `at`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Root;

/// What has been seen of a script while its tokens pass by.
struct Seen {
    statement_starts: bool,
    after_at: bool,
    /// For each open parenthesis, whether it was read as a bracket.
    open: Vec<bool>,
}

impl Seen {
    fn new() -> Self {
        Seen { statement_starts: true, after_at: false, open: Vec::new() }
    }

    fn read(&mut self, token: Token) -> Token {
        let after_at = std::mem::take(&mut self.after_at);
        let starts = std::mem::take(&mut self.statement_starts);
        match &token {
            Token::LeftParen => {
                self.open.push(after_at);
                if after_at {
                    return Token::LeftBracket;
                }
            }
            Token::RightParen if self.open.pop() == Some(true) => return Token::RightBracket,
            Token::Identifier(name) => self.after_at = starts && name.as_str() == "at",
            Token::SemiColon | Token::LeftBrace | Token::RightBrace => {
                self.statement_starts = true;
            }
            Token::EOF => *self = Seen::new(),
            _ => {}
        }
        token
    }
}

pub(super) fn register(engine: &mut Engine) {
    engine.register_type_with_name::<Root>("at");
    let seen = RefCell::new(Seen::new());
    let definitions = RefCell::new(Definitions::new());
    #[expect(deprecated, reason = "marked volatile by rhai; the only hook before the parser")]
    engine.on_parse_token(move |token, _, _| {
        let token = definitions.borrow_mut().read(token);
        seen.borrow_mut().read(token)
    });
    FuncRegistration::new_index_getter()
        .with_purity(true)
        .register_into_engine(engine, |_: &mut Root, path: &str| Block {
            path: path.to_owned(),
        });
    // Rhai writes the block back after the assignment below it; there is nothing to keep.
    FuncRegistration::new_index_setter()
        .with_purity(true)
        .register_into_engine(engine, |_: &mut Root, _: &str, _: Block| {});
}
