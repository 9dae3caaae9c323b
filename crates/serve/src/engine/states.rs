//! Kept states: the state of a model after some tokens, found again by those tokens or by a name.
//!
//! A state stands for its tokens: what a prompt shares with a kept one is not read again. A recurrent state can be used
//! whole only; the cache of attention also for the tokens that it shares. A named state keeps its tokens whatever happens
//! to its tensors: a state that is lost or damaged costs time, never a wrong answer.
//!
//! Memory has a budget; what was used longest ago leaves it, to a file where a folder is given.

use std::path::{Path, PathBuf};

use anyformer_models::ModelState;
use anyformer_ops::Device;

use super::file::{self, Head};

/// A named state, as it is told.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
pub struct StateInfo {
    /// Its name.
    pub name: String,
    /// Tokens that it stands for.
    pub tokens: usize,
    /// Of these, the tokens that need not be read again.
    pub kept_tokens: usize,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Whether it is in memory.
    pub in_memory: bool,
    /// Whether it survives a restart.
    pub on_disk: bool,
}

struct Entry {
    head: Head,
    state: Option<ModelState>,
    path: Option<PathBuf>,
    bytes: u64,
    used: u64,
}

impl Entry {
    fn in_memory(&self) -> u64 {
        self.state.as_ref().map_or(0, |_| self.bytes)
    }

    fn info(&self, name: &str) -> StateInfo {
        StateInfo {
            name: name.to_string(),
            tokens: self.head.ids.len(),
            kept_tokens: self.head.time,
            bytes: self.bytes,
            in_memory: self.state.is_some(),
            on_disk: self.path.is_some(),
        }
    }
}

/// Where and how much.
#[derive(Clone, Debug)]
pub struct StatesConfig {
    /// Bytes of states in memory.
    pub memory: u64,
    /// A folder for states; without one they end with the process.
    pub folder: Option<PathBuf>,
    /// Bytes of files of states without a name.
    pub disk: u64,
}

impl Default for StatesConfig {
    fn default() -> Self {
        StatesConfig {
            memory: 512 << 20,
            folder: None,
            disk: 4 << 30,
        }
    }
}

/// A folder of states that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StatesError {
    /// The system refused.
    #[error("open the folder of states {}: {source}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another server has it.
    #[error("open the folder of states {}: another process uses it", .0.display())]
    Held(PathBuf),
}

pub(super) struct States {
    entries: Vec<Entry>,
    clock: u64,
    config: StatesConfig,
    model: String,
    like: ModelState,
    device: Device,
    // Held for as long as the server runs.
    _lock: Option<std::fs::File>,
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Whether a text can be the name of a state, and so of a file.
pub(super) fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=64).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with('.')
}

impl States {
    /// `model` names the weights; `like` is a state of one sequence that the model made.
    pub(super) fn open(
        config: StatesConfig,
        model: String,
        like: ModelState,
        device: Device,
    ) -> Result<Self, StatesError> {
        let mut states = States {
            entries: Vec::new(),
            clock: 0,
            config,
            model,
            like,
            device,
            _lock: None,
        };
        if let Some(folder) = states.config.folder.clone() {
            states._lock = Some(lock(&folder)?);
            for kind in ["named", "kept"] {
                states.index(&folder.join(kind))?;
            }
        }
        Ok(states)
    }

    /// Takes up the files of a folder; those of other models and damaged ones are left alone.
    fn index(&mut self, folder: &Path) -> Result<(), StatesError> {
        let wrong = |source| StatesError::Io {
            path: folder.to_path_buf(),
            source,
        };
        std::fs::create_dir_all(folder).map_err(wrong)?;
        if let Err(error) = anyformer_hub::clean_temporaries(folder) {
            return Err(wrong(std::io::Error::other(error.to_string())));
        }
        let mut found = Vec::new();
        for item in std::fs::read_dir(folder).map_err(wrong)? {
            let item = item.map_err(wrong)?;
            let data = item.metadata().map_err(wrong)?;
            found.push((data.modified().map_err(wrong)?, item.path(), data.len()));
        }
        found.sort();
        for (_, path, bytes) in found {
            let Ok(head) = file::read_head(&path, &self.model) else {
                continue;
            };
            self.clock += 1;
            self.entries.push(Entry {
                head,
                state: None,
                path: Some(path),
                bytes,
                used: self.clock,
            });
        }
        Ok(())
    }

    /// The kept state that stands for most of the first `most` of `ids`, and for how many.
    pub(super) fn find(&mut self, ids: &[u32], most: usize) -> Option<(ModelState, usize)> {
        let usable = |entry: &Entry| {
            let shared = common(&entry.head.ids[..entry.head.time], ids);
            match (
                entry.head.rolls,
                shared == entry.head.time && shared <= most,
            ) {
                (true, _) => shared.min(most),
                (false, true) => shared,
                (false, false) => 0,
            }
        };
        loop {
            let lengths = self.entries.iter().map(usable).enumerate();
            // Among equals the one in memory.
            let in_memory = |at: usize| self.entries[at].state.is_some();
            let (at, length) = lengths.max_by_key(|(at, length)| (*length, in_memory(*at)))?;
            if length == 0 {
                return None;
            }
            self.clock += 1;
            self.entries[at].used = self.clock;
            match self.state_of(at) {
                Some(state) if state.times[0] == length => {
                    self.evict();
                    return Some((state, length));
                }
                Some(state) => {
                    let cut = state.rolled_back(length);
                    self.evict();
                    return cut.map(|state| (state, length));
                }
                // Its file is gone or damaged: it stands for nothing any more.
                None => self.forget_tensors(at),
            }
        }
    }

    fn state_of(&mut self, at: usize) -> Option<ModelState> {
        let entry = &mut self.entries[at];
        if entry.state.is_none() {
            let path = entry.path.as_ref()?;
            let (head, state) = file::read(path, &self.model, &self.like, &self.device).ok()?;
            if head != entry.head {
                return None;
            }
            entry.bytes = state.bytes();
            entry.state = Some(state);
        }
        entry.state.clone()
    }

    fn forget_tensors(&mut self, at: usize) {
        match self.entries[at].head.name {
            Some(_) => {
                self.entries[at].head.time = 0;
                self.entries[at].bytes = 0;
            }
            None => self.remove(at),
        }
    }

    fn remove(&mut self, at: usize) {
        let entry = self.entries.swap_remove(at);
        if let Some(path) = entry.path {
            // What cannot be removed is overwritten or left: it stands for the same tokens.
            let _ = std::fs::remove_file(path);
        }
    }

    /// Keeps the state after `ids` without a name.
    pub(super) fn keep(&mut self, ids: &[u32], state: ModelState) {
        self.clock += 1;
        let same = |entry: &&mut Entry| entry.head.time == ids.len() && entry.head.ids == *ids;
        if let Some(entry) = self.entries.iter_mut().find(same) {
            entry.used = self.clock;
            return;
        }
        let rolls = state.rolled_back(1).is_some();
        if rolls {
            // The longer one stands for the shorter ones too.
            let covered = |entry: &Entry| {
                entry.head.name.is_none() && entry.head.rolls && ids.starts_with(&entry.head.ids)
            };
            while let Some(at) = self.entries.iter().position(covered) {
                self.remove(at);
            }
        }
        let head = Head {
            name: None,
            ids: ids.to_vec(),
            time: ids.len(),
            rolls,
        };
        self.push(head, Some(state), None);
        self.evict();
    }

    fn push(&mut self, head: Head, state: Option<ModelState>, path: Option<PathBuf>) {
        self.clock += 1;
        self.entries.push(Entry {
            bytes: state.as_ref().map_or(0, ModelState::bytes),
            head,
            state,
            path,
            used: self.clock,
        });
    }

    /// Gives `ids` a name, with the state after the first `state.times[0]` of them; replaces the state of that name.
    pub(super) fn save(
        &mut self,
        name: &str,
        ids: Vec<u32>,
        state: Option<ModelState>,
    ) -> Result<StateInfo, String> {
        let head = Head {
            name: Some(name.to_string()),
            time: state.as_ref().map_or(0, |state| state.times[0]),
            rolls: state
                .as_ref()
                .is_some_and(|state| state.rolled_back(1).is_some()),
            ids,
        };
        let path = match &self.config.folder {
            Some(folder) => {
                let path = folder.join("named").join(format!("{name}.safetensors"));
                file::write(&path, &self.model, &head, state.as_ref())?;
                Some(path)
            }
            None => {
                let named = self.entries.iter().filter(|entry| {
                    entry.head.name.is_some() && entry.head.name.as_deref() != Some(name)
                });
                let held: u64 = named.map(Entry::in_memory).sum();
                let more = state.as_ref().map_or(0, ModelState::bytes);
                if held + more > self.config.memory {
                    return Err(format!(
                        "the named states would take {} bytes, more than the {} for states; delete some, raise the limit or give a folder",
                        held + more,
                        self.config.memory
                    ));
                }
                None
            }
        };
        if let Some(at) = self.position(name) {
            // Its file has been replaced.
            self.entries.swap_remove(at);
        }
        self.push(head, state, path);
        let info = self.entries[self.entries.len() - 1].info(name);
        self.evict();
        Ok(info)
    }

    fn position(&self, name: &str) -> Option<usize> {
        let named = |entry: &Entry| entry.head.name.as_deref() == Some(name);
        self.entries.iter().position(named)
    }

    /// The tokens of a named state.
    pub(super) fn ids(&self, name: &str) -> Option<&[u32]> {
        let at = self.position(name)?;
        Some(&self.entries[at].head.ids)
    }

    pub(super) fn list(&self) -> Vec<StateInfo> {
        let named = self.entries.iter().filter_map(|entry| {
            let name = entry.head.name.as_ref()?;
            Some(entry.info(name))
        });
        let mut all: Vec<StateInfo> = named.collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Copies a named state, or its first `tokens`.
    pub(super) fn fork(
        &mut self,
        from: &str,
        to: &str,
        tokens: Option<usize>,
    ) -> Result<Option<StateInfo>, String> {
        let Some(at) = self.position(from) else {
            return Ok(None);
        };
        let mut ids = self.entries[at].head.ids.clone();
        let state = match tokens {
            None if self.entries[at].head.time > 0 => self.state_of(at),
            None => None,
            Some(tokens) if tokens == 0 || tokens > ids.len() => {
                return Err(format!(
                    "expected 1 to {} tokens of {from:?}, got {tokens}",
                    ids.len()
                ));
            }
            Some(tokens) => {
                ids.truncate(tokens);
                self.find(&ids, tokens).map(|(state, _)| state)
            }
        };
        self.save(to, ids, state).map(Some)
    }

    pub(super) fn delete(&mut self, name: &str) -> bool {
        match self.position(name) {
            Some(at) => {
                self.remove(at);
                true
            }
            None => false,
        }
    }

    /// States and bytes in memory.
    pub(super) fn held(&self) -> (usize, u64) {
        let held = self.entries.iter().filter(|entry| entry.state.is_some());
        (
            held.count(),
            self.entries.iter().map(Entry::in_memory).sum(),
        )
    }

    /// Brings memory and disk under their budgets, what was used longest ago first.
    fn evict(&mut self) {
        while self.held().1 > self.config.memory {
            let leaves = |entry: &Entry| {
                entry.state.is_some() && (entry.head.name.is_none() || entry.path.is_some())
            };
            let candidates = (0..self.entries.len()).filter(|at| leaves(&self.entries[*at]));
            let Some(at) = candidates.min_by_key(|at| self.entries[*at].used) else {
                return;
            };
            self.spill(at);
            match self.entries[at].path.is_some() {
                true => self.entries[at].state = None,
                false => self.remove(at),
            }
        }
        loop {
            let files = |entry: &&Entry| entry.head.name.is_none() && entry.path.is_some();
            let bytes: u64 = self
                .entries
                .iter()
                .filter(files)
                .map(|entry| entry.bytes)
                .sum();
            if bytes <= self.config.disk {
                return;
            }
            let candidates = (0..self.entries.len()).filter(|at| files(&&self.entries[*at]));
            let Some(at) = candidates.min_by_key(|at| self.entries[*at].used) else {
                return;
            };
            self.remove(at);
        }
    }

    /// Writes a state without a name to its file, where there is a folder; a full disk only loses the state.
    fn spill(&mut self, at: usize) {
        let entry = &mut self.entries[at];
        let Some(folder) = &self.config.folder else {
            return;
        };
        if entry.path.is_some() || entry.bytes > self.config.disk {
            return;
        }
        let name = format!("{}.safetensors", file::ids_sum(&entry.head.ids));
        let path = folder.join("kept").join(name);
        if file::write(&path, &self.model, &entry.head, entry.state.as_ref()).is_ok() {
            entry.path = Some(path);
        }
    }

    /// Writes everything that is not on disk yet, for the next start.
    pub(super) fn spill_all(&mut self) {
        for at in 0..self.entries.len() {
            if self.entries[at].head.name.is_none() {
                self.spill(at);
            }
        }
        self.evict();
    }
}

fn lock(folder: &Path) -> Result<std::fs::File, StatesError> {
    let wrong = |source| StatesError::Io {
        path: folder.to_path_buf(),
        source,
    };
    std::fs::create_dir_all(folder).map_err(wrong)?;
    let file = std::fs::File::create(folder.join("lock")).map_err(wrong)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(StatesError::Held(folder.to_path_buf())),
        Err(std::fs::TryLockError::Error(error)) => Err(wrong(error)),
    }
}
