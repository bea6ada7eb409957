// Package reboot dumps all containers of a node before it reboots, and tells
// what became of them afterwards. It is the one implementation for the command
// and for the daemon.
//
// The dump itself is the shims' work, see package control: this package finds
// them by the bundles that containerd keeps, asks all of them at once, and then
// writes the node manifest.
//
// Invariants:
//
//   - Nothing is frozen while a kubelet runs, unless the caller says so: its
//     probes would kill frozen containers, and it would create their successors
//     from checkpoints that were meant for the next boot.
//   - The node manifest is written after the last dump, durably. No container is
//     restored because of it, or kept from being restored: that follows from the
//     records in the store alone. It says what is to be expected.
//   - Abort removes the manifest before any container goes on.
//   - Preparing and aborting exclude each other on one store, across processes.
//   - Preparing again completes what is missing and keeps what is there.
package reboot
