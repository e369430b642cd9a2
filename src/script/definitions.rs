//! Refuses reserved names where a script would define them: variables, loop variables,
//! parameters, aliases. Host names win silently, so the plan would read one thing and do another.

use rhai::{LexError, Token};

use super::host::RESERVED;

/// Where the tokens of a script stand that pass by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    /// An operand follows: a `|` here opens a closure's parameters.
    Start,
    /// A value has ended: a `|` here is an operator.
    Value,
    /// The next identifier is defined.
    Name,
    /// Every identifier up to the closing parenthesis or bar is defined.
    Names,
}

pub(super) struct Definitions {
    at: At,
    after_fn: bool,
}

impl Definitions {
    pub fn new() -> Self {
        Definitions { at: At::Start, after_fn: false }
    }

    /// The token, or an error in its place if it defines a reserved name.
    pub fn read(&mut self, token: Token) -> Token {
        let defines = matches!(self.at, At::Name | At::Names);
        self.at = match &token {
            Token::Identifier(name) if defines && RESERVED.contains(&name.as_str()) => {
                let word = LexError::ImproperSymbol(name.to_string(), RESERVED_WORD.to_owned());
                *self = Definitions::new();
                return Token::LexError(Box::new(word));
            }
            Token::Let | Token::Const | Token::As => At::Name,
            Token::For | Token::Catch => At::Names,
            Token::Fn => {
                self.after_fn = true;
                At::Start
            }
            Token::LeftParen if self.after_fn => {
                self.after_fn = false;
                At::Names
            }
            // Rhai reads `()` as one token, the empty list of a function's parameters too.
            Token::Unit => {
                self.after_fn = false;
                At::Value
            }
            Token::LeftParen | Token::Comma | Token::Identifier(_) if self.at == At::Names => {
                At::Names
            }
            Token::Pipe if self.at == At::Start => At::Names,
            Token::Pipe | Token::In | Token::LeftBrace => At::Start,
            Token::RightParen | Token::RightBracket | Token::RightBrace => At::Value,
            Token::Identifier(_)
            | Token::IntegerConstant(_)
            | Token::FloatConstant(_)
            | Token::StringConstant(_)
            | Token::CharConstant(_)
            | Token::True
            | Token::False => At::Value,
            _ => At::Start,
        };
        token
    }
}

/// Marks the error of [`Definitions`] among those of rhai's own reader.
pub(super) const RESERVED_WORD: &str = "reserved name";
