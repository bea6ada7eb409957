// Package shim decorates containerd's runc task service with a dump when a
// container is stopped and a restore when it is created again.
//
// The inner service does all of the work with the OCI runtime and is never
// copied; a container that did not opt in is passed through untouched.
//
// Invariants:
//
//   - Every dump ends in one of two states: the checkpoint is committed and the
//     container is dead, or the container was thawed and got its signal. One for
//     a reboot leaves the container frozen with its checkpoint, or running
//     without one; see reboot.go for what may follow.
//   - A freeze has one owner, the dump job, which thaws on every path that does
//     not end in the container's death or in its wait for a reboot.
//   - No container runs on after its checkpoint was committed: the checkpoint is
//     removed before the thaw.
//   - A checkpoint is claimed before Create answers, and consumed, released or
//     quarantined before Start answers; where memory is filled after the start,
//     when it is full, and before the container can be dumped or deleted.
//   - Nobody gets at a restored container before its hook is done. One whose hook
//     has failed is dead before another is started in its place, and its
//     checkpoint is not restored again.
//   - A container whose memory nobody can fill any more is dead before the last
//     descriptor of that memory is closed; see lazy.go.
//   - A panic would take the pod down, so nothing here indexes or converts
//     what was not checked. The inner service reaps every child of the shim, so
//     nobody here waits for one.
//
// Lock order: service.mu, then container.mu; neither is held across a call to
// the inner service, CRIU or the disk.
package shim
