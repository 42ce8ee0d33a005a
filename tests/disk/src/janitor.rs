//! Ends a mount whose server was killed.
//!
//! A killed process is gone once all its threads are; one that waits for an answer of the disk waits for ever, because the
//! threads that would give it are dead, while the connection stays open as long as there is any thread. So somebody else has
//! to cut it.

use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Runs in a session of its own: whoever kills a test kills its process group.
const SCRIPT: &str = r#"
while state=$(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null) && [ -n "$state" ] && [ "$state" != Z ]
do sleep 0.5; done
umount --force "$2"; umount --lazy "$2"
"#;

/// A process that waits for this one to be killed. Ends when dropped.
#[derive(Debug)]
pub struct Janitor(Child);

impl Janitor {
    pub fn watch(mount: &Path) -> io::Result<Self> {
        let mut command = Command::new("setsid");
        command.args(["sh", "-c", SCRIPT, "janitor"]).arg(std::process::id().to_string()).arg(mount).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().map(Self)
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait());
    }
}
