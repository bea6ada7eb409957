package criu

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// ConfigOptions are the options of CRIU that stasis sets through a
// configuration file. CRIU reads it after the request, and each of its lines
// overrides the request (CRIU criu/cr-service.c:setup_opts_from_req;
// libcontainer/criu_linux.go:handleCriuConfigurationFile). The same set of
// options is accepted for dump and restore (CRIU criu/config.c:parse_options).
type ConfigOptions struct {
	// TCPClose leaves connections out of a dump: their sockets are not even
	// put into repair mode, so that the dumped task may go on using them
	// (CRIU criu/sk-tcp.c:dump_one_tcp); a restore gives sockets that are shut
	// down. Images of such a dump are refused by a restore without it (CRIU
	// criu/image.c:check_img_inventory).
	TCPClose bool
	// TCPEstablished saves and restores connections.
	TCPEstablished bool
	// SkipInFlight forgets connections that nobody has accepted yet; without it
	// a listening socket with one of them makes the dump fail (CRIU
	// criu/sk-inet.c:can_dump_inet_sk). Needed at dump.
	SkipInFlight bool
	// SkipNetworkLock leaves the network alone while tasks are dumped. Without
	// it CRIU drops all traffic of the container's network namespace, so of the
	// whole pod, by rules of iptables from before the dump until after it (CRIU
	// criu/net.c:network_lock_internal), which takes 60 to 100 ms of the frozen
	// time, and leaves the rules behind when it is killed. Needed only where
	// connections are saved. See [CanSkipNetworkLock].
	SkipNetworkLock bool
	// FileLocks saves and restores flock, POSIX locks and leases. Without it a
	// held lock makes the dump fail. Needed at both.
	FileLocks bool
	// LinkRemap lets a dump make a hard link for a file that is open and has
	// lost its name, but not its last one. After a dump that leaves the tasks
	// alive CRIU removes these links at once (CRIU criu/cr-dump.c:cr_dump_finish,
	// delete_link_remaps), so they are in no copy of the writable layer, and a
	// restore fails for want of them. Leave it off unless they are made again.
	LinkRemap bool
	// ExternalUnix allows datagram sockets connected to a peer outside the
	// container; stream sockets of this kind cannot be dumped. Needed at both.
	ExternalUnix bool
	// ShellJob makes a terminal of CRIU's caller the terminal of the tasks. Not
	// for containers: runc hands over the container's own terminal.
	ShellJob bool
	// GhostLimit is the greatest size, in bytes, of an open file without a name
	// that is saved in the images; 0 leaves CRIU's 1 MiB. Needed at dump.
	GhostLimit uint64
	// Timeout bounds the time in which all tasks must have stopped, not the
	// dump as a whole; 0 leaves CRIU's 10 s. Rounded up to seconds.
	Timeout time.Duration
	// LazyPages makes a restore fetch memory from a pager. Never at dump, where
	// it would make CRIU serve pages instead of writing them.
	LazyPages bool
	// External are mounts that a restore takes from the node, by their keys in the
	// images, as absolute paths. Neither may hold white space. Needed at restore.
	External map[string]string
	// InheritFD are descriptors of CRIU's own that a restore takes for the files of
	// these names, without the leading slash. Needed at restore.
	InheritFD map[string]int
}

// DefaultGhostLimit is what stasis accepts of open files without a name.
const DefaultGhostLimit = 64 << 20

// DumpOptions are the options of a dump that leaves the tasks alive.
func DumpOptions(tcp checkpoint.TCP) ConfigOptions {
	return ConfigOptions{
		TCPClose:       tcp != checkpoint.TCPKeep,
		TCPEstablished: tcp == checkpoint.TCPKeep,
		SkipInFlight:   true,
		FileLocks:      true,
		ExternalUnix:   true,
		GhostLimit:     DefaultGhostLimit,
	}
}

// RestoreOptions are the options of a restore of such a dump.
func RestoreOptions(tcp checkpoint.TCP, lazy bool) ConfigOptions {
	return ConfigOptions{
		TCPClose:       tcp != checkpoint.TCPKeep,
		TCPEstablished: tcp == checkpoint.TCPKeep,
		FileLocks:      true,
		ExternalUnix:   true,
		LazyPages:      lazy,
	}
}

// Config is the content of a CRIU configuration file with these options.
func Config(o ConfigOptions) string {
	var b strings.Builder
	for _, l := range []struct {
		on   bool
		line string
	}{
		{o.TCPClose, "tcp-close"},
		{o.TCPEstablished, "tcp-established"},
		{o.SkipInFlight, "skip-in-flight"},
		{o.SkipNetworkLock, "network-lock skip"},
		{o.FileLocks, "file-locks"},
		{o.LinkRemap, "link-remap"},
		{o.ExternalUnix, "ext-unix-sk"},
		{o.ShellJob, "shell-job"},
		{o.GhostLimit > 0, fmt.Sprintf("ghost-limit %d", o.GhostLimit)},
		{o.Timeout > 0, fmt.Sprintf("timeout %d", (o.Timeout+time.Second-1)/time.Second)},
		{o.LazyPages, "lazy-pages"},
	} {
		if l.on {
			b.WriteString(l.line + "\n")
		}
	}
	for _, key := range slices.Sorted(maps.Keys(o.External)) {
		fmt.Fprintf(&b, "external mnt[%s]:%s\n", key, o.External[key])
	}
	for _, key := range slices.Sorted(maps.Keys(o.InheritFD)) {
		fmt.Fprintf(&b, "inherit-fd fd[%d]:%s\n", o.InheritFD[key], key)
	}
	return b.String()
}

// CanLazyRestore tells whether a CRIU of this version speaks the protocol of
// package pager, which is that of 4.2 (criu/uffd.c).
func CanLazyRestore(version string) bool {
	v, err := parseVersion(version)
	return err == nil && slices.Compare(v, []int{4, 2}) >= 0
}

// CanSkipNetworkLock tells whether a CRIU of this version may be given
// [ConfigOptions.SkipNetworkLock]. 4.2 and older crash on the option in a
// configuration file that a request names: criu/config.c:parse_options looks
// at its arguments then, and there are none.
func CanSkipNetworkLock(version string) bool {
	v, err := parseVersion(version)
	return err == nil && slices.Compare(v, []int{4, 2, 1}) >= 0
}
