package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// process is what /proc says of one process of the container.
type process struct {
	pid    int
	ppid   int
	comm   string
	cgroup string
	pidNS  string
	tracer string
	fds    map[int]string // targets of /proc/PID/fd
	maps   []string       // files that are mapped
	rss    int64          // bytes, without what is mapped from files
}

var containerIDForm = regexp.MustCompile(`^[0-9A-Za-z._-]{8,}$`)

// container checks a running container, named by the number of one of its
// processes or by its ID, of which 8 digits are enough.
func (d *doctor) container(name string) ([]finding, error) {
	all, err := d.cgroups()
	if err != nil {
		return nil, err
	}
	path := ""
	if pid, err := strconv.Atoi(name); err == nil && len(name) < 8 {
		if path = all[pid]; path == "" {
			return nil, fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
		}
	} else {
		if !containerIDForm.MatchString(name) {
			return nil, usageError{fmt.Errorf("--container %q: want a process, or 8 or more digits of a container's ID", name)}
		}
		for _, cg := range all {
			if !strings.HasPrefix(containerIDOf(cg), name) || cg == path {
				continue
			}
			if path != "" {
				return nil, usageError{fmt.Errorf("--container %q: more than one begins so", name)}
			}
			path = cg
		}
		if path == "" {
			return nil, fmt.Errorf("no process belongs to a container %q (crictl ps shows those that run): %w", name, errdefs.ErrNotFound)
		}
	}
	var ps []process
	for pid, cg := range all {
		if cg != path && !strings.HasPrefix(cg, path+"/") {
			continue
		}
		p, err := d.process(pid)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it ended meanwhile
		}
		if err != nil {
			return nil, err
		}
		p.cgroup = cg
		ps = append(ps, p)
	}
	slices.SortFunc(ps, func(a, b process) int { return a.pid - b.pid })
	if len(ps) == 0 {
		return nil, fmt.Errorf("container %q has ended: %w", name, errdefs.ErrNotFound)
	}
	return d.judge(path, ps, all), nil
}

// containerIDOf takes the ID from the end of a cgroup's path: ".../ID", or
// ".../cri-containerd-ID.scope" with the systemd driver.
func containerIDOf(cgroup string) string {
	base, systemd := strings.CutSuffix(filepath.Base(cgroup), ".scope")
	if i := strings.LastIndex(base, "-"); i >= 0 && systemd {
		base = base[i+1:]
	}
	return base
}

// cgroups maps each process of the node to its cgroup: that of v2 where it is
// not the root, else that of the freezer.
func (d *doctor) cgroups() (map[int]string, error) {
	entries, err := os.ReadDir(d.path("/proc"))
	if err != nil {
		return nil, err
	}
	all := map[int]string{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(d.path("/proc/" + e.Name() + "/cgroup"))
		if err != nil {
			continue // it ended meanwhile
		}
		all[pid] = parseCgroup(string(b))
	}
	return all, nil
}

// parseCgroup reads lines such as "0::/kubepods/x" and "7:freezer:/kubepods/x".
func parseCgroup(s string) string {
	path := ""
	for _, line := range strings.Split(s, "\n") {
		f := strings.SplitN(line, ":", 3)
		switch {
		case len(f) != 3 || f[2] == "/":
		case f[0] == "0" && f[1] == "":
			return f[2]
		case slices.Contains(strings.Split(f[1], ","), "freezer"):
			path = f[2]
		}
	}
	return path
}

func (d *doctor) process(pid int) (process, error) {
	dir := d.path("/proc/" + strconv.Itoa(pid))
	p := process{pid: pid, fds: map[int]string{}}
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return p, err
	}
	for _, line := range strings.Split(string(status), "\n") {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "Name":
			p.comm = value
		case "PPid":
			p.ppid, _ = strconv.Atoi(value) // the kernel's own words
		case "TracerPid":
			if value != "0" {
				p.tracer = value
			}
		case "RssAnon", "RssShmem":
			kb, _ := strconv.ParseInt(strings.TrimSuffix(value, " kB"), 10, 64) // the kernel's own words
			p.rss += kb << 10
		}
	}
	if p.pidNS, err = os.Readlink(filepath.Join(dir, "ns/pid")); err != nil {
		return p, err
	}
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return p, err
	}
	for _, e := range fds {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			if target, err := os.Readlink(filepath.Join(dir, "fd", e.Name())); err == nil {
				p.fds[n] = target
			}
		}
	}
	maps, err := os.Open(filepath.Join(dir, "maps"))
	if err != nil {
		return p, err
	}
	defer maps.Close()
	for s := bufio.NewScanner(maps); s.Scan(); {
		if i := strings.Index(s.Text(), "/"); i >= 0 && !slices.Contains(p.maps, s.Text()[i:]) {
			p.maps = append(p.maps, s.Text()[i:])
		}
	}
	return p, nil
}

// harmless are devices that CRIU dumps: those of memory, and terminals.
var harmless = regexp.MustCompile(`^/dev/(null|zero|full|random|urandom|tty|ptmx|console|pts/.*|shm/.*|mqueue/.*|net/tun)( \(deleted\))?$`)

// accelerators need a plugin of CRIU that knows the device.
var accelerators = regexp.MustCompile(`^/dev/(nvidia|kfd|dri/|accel/|vfio/|infiniband/)`)

// judge says what of the container cannot be dumped.
func (d *doctor) judge(path string, ps []process, all map[int]string) []finding {
	name := func(check string) string { return "container: " + check }
	where := func(p process) string { return fmt.Sprintf("process %d (%s)", p.pid, p.comm) }
	var rings, mptcp, gpus, devices, traced []string
	var memory int64
	namespaces := map[string]bool{}
	for _, p := range ps {
		memory += p.rss
		namespaces[p.pidNS] = true
		if p.tracer != "" {
			traced = append(traced, fmt.Sprintf("%s by process %s", where(p), p.tracer))
		}
		open := append([]string(nil), p.maps...)
		for n, target := range p.fds {
			switch {
			case target == "anon_inode:[io_uring]":
				rings = append(rings, fmt.Sprintf("%s descriptor %d", where(p), n))
			case strings.HasPrefix(target, "socket:") && isMPTCP(p.pid, n):
				mptcp = append(mptcp, fmt.Sprintf("%s descriptor %d", where(p), n))
			}
			open = append(open, target)
		}
		seen := map[string]bool{}
		for _, f := range open {
			if seen[f] || !strings.HasPrefix(f, "/dev/") || harmless.MatchString(f) {
				continue
			}
			seen[f] = true
			if accelerators.MatchString(f) {
				gpus = append(gpus, where(p)+" "+f)
			} else {
				devices = append(devices, where(p)+" "+f)
			}
		}
	}
	fs := d.served(path, ps)
	check := func(l level, what, fix string, found []string, fine string) {
		if len(found) == 0 {
			fs = append(fs, ok(name(what), "%s", fine))
			return
		}
		slices.Sort(found)
		more := ""
		if n := len(found) - 5; n > 0 {
			found, more = found[:5], fmt.Sprintf(", and %d more", n)
		}
		fs = append(fs, bad(l, name(what), fix, "%s%s", strings.Join(found, ", "), more))
	}
	check(levelFail, "io_uring", "turn io_uring off in the application; many libraries have a switch", rings, "not used")
	check(levelFail, "mptcp", "set GODEBUG=multipathtcp=0 in the container's environment: servers built with Go 1.24 or later listen with it", mptcp, "no sockets")
	check(levelFail, "accelerators", "only with CRIU's plugin for that device, which stasis does not set up", gpus, "none open")
	check(levelWarn, "devices", "close it before the container is stopped; CRIU dumps no such device", devices, "none open")
	check(levelFail, "ptrace", "end the debugger or tracer", traced, "nobody traces it")

	outside := func(pid int, cg string) bool {
		if cg == path || strings.HasPrefix(cg, path+"/") {
			return false
		}
		ns, err := os.Readlink(d.path(fmt.Sprintf("/proc/%d/ns/pid", pid)))
		return err == nil && namespaces[ns]
	}
	var sharers []string
	for pid, cg := range all {
		if !outside(pid, cg) {
			continue
		}
		// A process that is just ending, or just being put into the container,
		// is in another control group for a moment.
		time.Sleep(50 * time.Millisecond)
		b, err := os.ReadFile(d.path(fmt.Sprintf("/proc/%d/cgroup", pid)))
		if err == nil && outside(pid, parseCgroup(string(b))) {
			sharers = append(sharers, strconv.Itoa(pid))
		}
	}
	if len(sharers) > 0 {
		sharers = []string{fmt.Sprintf("shared with %d processes outside of the container", len(sharers))}
	}
	check(levelFail, "pid namespace", "no shareProcessNamespace and no hostPID in the pod", sharers, "its own")

	switch free, _, err := d.freeBytes(d.path(d.storeRoot)); {
	case err != nil:
		fs = append(fs, bad(levelFail, name("memory"), "start stasisd, which makes the store", "%v", err))
	case free < memory+minSpace:
		fs = append(fs, bad(levelFail, name("memory"), "stasis gc, or a larger file system for the store", "%s to dump, %s free in the store", size(memory), size(free)))
	default:
		fs = append(fs, ok(name("memory"), "%s to dump, %s free in the store", size(memory), size(free)))
	}
	return fs
}

// bundles is where containerd keeps the bundles of CRI's containers.
const bundles = "/run/containerd/io.containerd.runtime.v2.task/k8s.io"

// served says whether the shim and the daemon know the container at all.
func (d *doctor) served(path string, ps []process) []finding {
	const name = "container: opted in"
	inside := map[int]bool{}
	for _, p := range ps {
		inside[p.pid] = true
	}
	shim := ""
	for _, p := range ps {
		if !inside[p.ppid] {
			b, err := os.ReadFile(d.path(fmt.Sprintf("/proc/%d/cmdline", p.ppid)))
			if err == nil {
				argv0, _, _ := strings.Cut(string(b), "\x00")
				shim = filepath.Base(argv0)
			}
			break // exec processes have the same parent
		}
	}
	if shim != shimName {
		return []finding{bad(levelFail, name, "give the pod the RuntimeClass of the stasis runtime, and create it again", "it runs under %q, not under %s", shim, shimName)}
	}
	b, err := readConfig(d.path(filepath.Join(bundles, containerIDOf(path), "config.json")))
	if err != nil {
		return []finding{bad(levelWarn, name, "doctor expects the bundles in "+bundles, "%v", err)}
	}
	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(b, &spec); err != nil {
		return []finding{bad(levelWarn, name, "create the pod again", "its bundle: %v", err)}
	}
	policy := spec.Annotations[checkpoint.InternalPolicy]
	if policy == "" {
		return []finding{bad(levelFail, name, "annotate the pod with "+checkpoint.AnnotationPolicy+": resume, have stasisd running, and create the pod again; stasis events tells of refused annotations",
			"stasisd did not opt it in when it was created")}
	}
	return []finding{ok(name, "policy %s, key %s", policy, spec.Annotations[checkpoint.InternalKey])}
}

// isMPTCP reports whether the process's descriptor is an MPTCP socket. It asks
// the socket itself, through a copy of the descriptor: sock_diag would need a
// kernel module and the container's network namespace.
func isMPTCP(pid, fd int) bool {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false
	}
	defer unix.Close(pidfd)
	s, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return false
	}
	defer unix.Close(s)
	proto, err := unix.GetsockoptInt(s, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return err == nil && proto == unix.IPPROTO_MPTCP
}
