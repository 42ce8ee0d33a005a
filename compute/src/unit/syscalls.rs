//! The system calls that Postgres and what it starts may not make: those that make, enter or change namespaces and mounts,
//! look into other processes, load code into the kernel, or reach past the network namespace. A list of what is
//! forbidden, not of what is allowed: Postgres' extensions may use anything ordinary, and this is one wall of several.

use std::collections::BTreeMap;
use std::io;

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as Condition,
    SeccompFilter, SeccompRule as Rule, apply_filter,
};

/// Forbidden whatever their arguments.
const FORBIDDEN: &[libc::c_long] = &[
    // Mounts and roots.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    // Namespaces.
    libc::SYS_unshare,
    libc::SYS_setns,
    // Files by handles, which know no root.
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // The kernel itself, and those of its parts with the worst record.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_fanotify_init,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
];

/// Kinds of sockets that have a use here. Some of the others know no network namespace (vsock reaches the host of a
/// virtual machine).
const FAMILIES: [libc::c_int; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Forbids them to the calling thread and to whatever it starts, for ever: the calls fail with `EPERM`.
pub(super) fn restrict() -> io::Result<()> {
    for filter in filters().map_err(io::Error::other)? {
        apply_filter(&filter).map_err(io::Error::other)?;
    }
    Ok(())
}

fn filters() -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    let filter = |rules, errno: libc::c_int| -> Result<BpfProgram, seccompiler::BackendError> {
        let refuse = SeccompAction::Errno(errno.unsigned_abs());
        SeccompFilter::new(rules, SeccompAction::Allow, refuse, std::env::consts::ARCH.try_into()?)?.try_into()
    };
    let mut rules: BTreeMap<i64, Vec<Rule>> = FORBIDDEN.iter().map(|&call| (call, Vec::new())).collect();
    #[cfg(target_arch = "x86_64")]
    rules.extend([libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_modify_ldt].map(|call| (call, Vec::new())));
    let spaces = libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWPID;
    let spaces = (0..u32::BITS).map(|bit| 1_u64 << bit).filter(|bit| spaces as u64 & bit != 0);
    let spaces = spaces.map(|flag| Rule::new(vec![Condition::new(0, Len::Qword, Op::MaskedEq(flag), flag)?]));
    rules.insert(libc::SYS_clone, spaces.collect::<Result<_, _>>()?);
    let other = FAMILIES.iter().map(|&family| Condition::new(0, Len::Dword, Op::Ne, family as u64));
    rules.insert(libc::SYS_socket, vec![Rule::new(other.collect::<Result<_, _>>()?)?]);
    // Its arguments are in memory, where no filter can look. Told that there is no such call, C libraries use clone.
    let newer = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    Ok([filter(rules, libc::EPERM)?, filter(newer, libc::ENOSYS)?])
}

#[cfg(test)]
mod tests {
    use std::thread;

    use nix::sched::{CloneFlags, unshare};
    use rustix::net::{AddressFamily, SocketType, socket};

    use super::*;

    #[test]
    fn a_restricted_thread_can_start_threads_and_no_namespace() {
        let found = thread::spawn(|| {
            nix::sys::prctl::set_no_new_privs().unwrap();
            restrict().unwrap();
            let namespace = unshare(CloneFlags::CLONE_NEWUSER);
            let vsock = socket(AddressFamily::VSOCK, SocketType::STREAM, None).map(drop);
            let unix = socket(AddressFamily::UNIX, SocketType::STREAM, None).map(drop);
            let child = thread::spawn(|| 7).join().unwrap();
            let program = std::process::Command::new("true").status().unwrap();
            (namespace, vsock, unix, child, program.success())
        });
        let (namespace, vsock, unix, child, program) = found.join().unwrap();
        assert_eq!(namespace, Err(nix::errno::Errno::EPERM));
        assert_eq!(vsock, Err(rustix::io::Errno::PERM));
        assert_eq!((unix, child, program), (Ok(()), 7, true));
    }
}
