//! A conversation as one prompt, in the words of the model's own template (Jinja, as `transformers` writes it into
//! `tokenizer_config.json` or `chat_template.jinja`).

use std::path::{Path, PathBuf};

use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::tokenizer::Tokenizer;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A template that cannot be read or used.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// A file that cannot be read.
    #[error("read {path}: {message}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A template that refuses the conversation, or is broken.
    #[error("write the conversation by the model's chat template: {0}")]
    Template(String),
}

/// How a model wants a conversation to be written.
pub struct ChatTemplate {
    environment: Option<Environment<'static>>,
    begin: String,
    end: String,
}

/// The text of a file of a model folder; `None` where there is none.
fn text(folder: &Path, name: &str) -> Result<Option<String>, ChatError> {
    let path = folder.join(name);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ChatError::Read {
            path,
            message: error.to_string(),
        }),
    }
}

fn json(folder: &Path, name: &str) -> Result<Value, ChatError> {
    let Some(text) = text(folder, name)? else {
        return Ok(Value::Null);
    };
    serde_json::from_str(&text).map_err(|error| ChatError::Read {
        path: folder.join(name),
        message: error.to_string(),
    })
}

/// A special token, which stands as a text or as a table with its `content`.
fn special(config: &Value, key: &str) -> String {
    let token = &config[key];
    let text = token.as_str().or_else(|| token["content"].as_str());
    text.unwrap_or_default().to_string()
}

impl ChatTemplate {
    /// The template of a model folder: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json` (of several
    /// the one named `default`). Without either, the plain form `role: content`, a line each.
    pub fn from_folder(folder: &Path) -> Result<Self, ChatError> {
        let config = json(folder, "tokenizer_config.json")?;
        let written = match (
            text(folder, "chat_template.jinja")?,
            &config["chat_template"],
        ) {
            (Some(text), _) => Some(text),
            (None, Value::String(text)) => Some(text.clone()),
            (None, Value::Array(several)) => several
                .iter()
                .find(|one| one["name"] == "default")
                .and_then(|one| one["template"].as_str())
                .map(str::to_string),
            _ => None,
        };
        Self::new(
            written,
            special(&config, "bos_token"),
            special(&config, "eos_token"),
        )
    }

    /// A template from its text (`None`: the plain form), with the tokens that it may call `bos_token` and `eos_token`.
    pub fn new(written: Option<String>, begin: String, end: String) -> Result<Self, ChatError> {
        let environment = match written {
            None => None,
            Some(written) => {
                let mut environment = Environment::new();
                environment.set_trim_blocks(true);
                environment.set_lstrip_blocks(true);
                environment.set_unknown_method_callback(
                    minijinja_contrib::pycompat::unknown_method_callback,
                );
                environment.add_function("raise_exception", |message: String| {
                    Err::<String, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
                });
                environment
                    .add_template_owned("chat", written)
                    .map_err(|error| ChatError::Template(error.to_string()))?;
                Some(environment)
            }
        };
        Ok(ChatTemplate {
            environment,
            begin,
            end,
        })
    }

    /// The conversation as a prompt; `add_generation_prompt` ends it where the model's answer begins.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        let Some(environment) = &self.environment else {
            let lines = messages.iter();
            let mut text: String = lines
                .map(|message| format!("{}: {}\n", message.role, message.content))
                .collect();
            if add_generation_prompt {
                text.push_str("assistant:");
            }
            return Ok(text);
        };
        let wrong = |error: minijinja::Error| match error.detail() {
            Some(detail) => ChatError::Template(detail.to_string()),
            None => ChatError::Template(error.to_string()),
        };
        let template = environment.get_template("chat").map_err(wrong)?;
        let values = context! {
            messages, add_generation_prompt, bos_token => self.begin, eos_token => self.end,
        };
        template.render(values).map_err(wrong)
    }

    /// Texts that end an answer, for a form that has no token for it.
    pub fn stop_strings(&self) -> &'static [&'static str] {
        match self.environment {
            Some(_) => &[],
            None => &["\nuser:", "\nsystem:"],
        }
    }
}

/// The tokens that end an answer: `eos_token_id` of `generation_config.json` and `config.json`, and `eos_token` of
/// `tokenizer_config.json`.
pub fn end_ids(folder: &Path, tokenizer: &Tokenizer) -> Result<Vec<u32>, ChatError> {
    let mut ids = Vec::new();
    for name in ["generation_config.json", "config.json"] {
        match &json(folder, name)?["eos_token_id"] {
            Value::Array(several) => ids.extend(several.iter().filter_map(Value::as_u64)),
            one => ids.extend(one.as_u64()),
        }
    }
    let mut ids: Vec<u32> = ids
        .into_iter()
        .filter_map(|id| id.try_into().ok())
        .collect();
    let named = special(&json(folder, "tokenizer_config.json")?, "eos_token");
    if !named.is_empty() {
        ids.extend(tokenizer.id_of(&named));
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages() -> Vec<Message> {
        let message = |role: &str, content: &str| Message {
            role: role.into(),
            content: content.into(),
        };
        vec![
            message("system", "Be brief."),
            message("user", " Hi {{ you }} "),
        ]
    }

    fn folder(config: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        folder
    }

    #[test]
    fn a_template_of_the_folder_is_followed() {
        let template = "{% for message in messages %}\n{% if message['role'] not in ['system', 'user'] %}{{ raise_exception('roles!') }}{% endif %}{{ '<|' + message.role + '|>' + message['content'].strip() + eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}<|assistant|>{% endif %}";
        let config = serde_json::json!({
            "chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": template}],
            "eos_token": {"content": "</s>"},
        });
        let folder = folder(&config.to_string());
        let chat = ChatTemplate::from_folder(folder.path()).unwrap();
        assert_eq!(
            chat.render(&messages(), true).unwrap(),
            "<|system|>Be brief.</s>\n<|user|>Hi {{ you }}</s>\n<|assistant|>"
        );
        assert!(chat.stop_strings().is_empty());
        let mut wrong = messages();
        wrong[0].role = "tool".into();
        let error = chat.render(&wrong, true).unwrap_err().to_string();
        assert!(error.ends_with("roles!"), "{error}");
        std::fs::write(
            folder.path().join("chat_template.jinja"),
            "{{ bos_token }}!",
        )
        .unwrap();
        let chat = ChatTemplate::from_folder(folder.path()).unwrap();
        assert_eq!(chat.render(&messages(), false).unwrap(), "!");
    }

    #[test]
    fn without_a_template_the_roles_stand_before_the_words() {
        let folder = tempfile::tempdir().unwrap();
        let chat = ChatTemplate::from_folder(folder.path()).unwrap();
        let text = chat.render(&messages(), true).unwrap();
        assert_eq!(text, "system: Be brief.\nuser:  Hi {{ you }} \nassistant:");
        assert_eq!(chat.stop_strings()[0], "\nuser:");
    }

    #[test]
    fn broken_files_are_named() {
        for (config, part) in [
            ("{", "tokenizer_config.json"),
            ("{\"chat_template\":\"{% for %}\"}", "template"),
        ] {
            let folder = folder(config);
            let error = ChatTemplate::from_folder(folder.path()).err().unwrap();
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn ends_come_from_every_config() {
        let folder = folder("{\"eos_token\":\"A\"}");
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("config.json", "{\"eos_token_id\":2}");
        write("generation_config.json", "{\"eos_token_id\":[7,2]}");
        assert_eq!(
            end_ids(folder.path(), &Tokenizer::Bytes).unwrap(),
            [2, 7, 65]
        );
    }
}
