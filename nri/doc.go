// Package nri is the daemon of a node: it tells containerd, through NRI, which
// containers the shim may dump and from which checkpoint each begins, removes
// old checkpoints, and shows what happens as metrics.
//
// Invariants:
//
//   - It never touches a process of a container. Decisions travel as annotations
//     in the OCI spec, everything else through the store; containers that have
//     to do with templates get one mount more, see
//     [checkpoint.GenerationMount]. Only when the node goes down it asks the
//     shims to dump, as the command does, see package reboot.
//   - A request of the runtime is answered within [DecisionTimeout], whatever
//     the disk does: the runtime has one budget of two seconds for all plugins
//     and disconnects a plugin that is late. Lookups run aside and are given up
//     when late; events and the setting aside of records are queued.
//   - A handler returns an error, which fails the creation of the container,
//     in two cases only: the pod asked for strictness
//     ([checkpoint.OnFailureFail]) and the store could not be asked, so that a
//     cold start might throw away what the pod must not lose, or the template
//     that it names is not there.
//   - Settings come from the pod's annotations alone. Reserved annotations that
//     anybody else wrote are removed or overwritten.
//
// Nothing in NRI tells an init container from another one. One that exits by
// itself is never dumped, so an annotation of the whole pod does no harm; the
// per-container form of the annotations leaves init containers out.
package nri
