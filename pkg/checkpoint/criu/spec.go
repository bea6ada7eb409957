package criu

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/creds"
	core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// CheckAgainstSpec checks that the tasks in an image directory have no more
// rights than the container's live spec gives: CRIU restores credentials,
// seccomp filters and mounts as the images say, whatever the spec says.
//
// Compared are, for every thread: capabilities, securebits, no_new_privs, user
// and group ids, seccomp mode and security profile; and for the container: its
// number of tasks, namespaces, mounts and the names of open files. Not
// compared is the content of seccomp filters.
//
// Errors wrap [checkpoint.ErrIncompatible], naming process and field, or
// [checkpoint.ErrCorrupt] where the images do not parse.
func CheckAgainstSpec(imageDir string, spec *specs.Spec) error {
	if spec == nil || spec.Process == nil || spec.Linux == nil {
		return fmt.Errorf("spec without process or linux: %w", checkpoint.ErrInvalid)
	}
	lim, err := newLimits(spec)
	if err != nil {
		return err
	}
	d, err := openImages(imageDir)
	if err != nil {
		return err
	}
	defer d.Close()
	inv, err := d.inventory()
	if err != nil {
		return err
	}
	lim.lsm = inv.LSM
	tasks, err := d.tasks()
	if err != nil {
		return err
	}
	if err := lim.checkCount(tasks); err != nil {
		return err
	}
	filters, err := d.seccompFilters()
	if err != nil {
		return err
	}
	mountNamespaces := map[uint32]bool{}
	for _, t := range tasks {
		if t.zombie() {
			continue
		}
		if err := lim.checkNamespaces(t, tasks[0]); err != nil {
			return err
		}
		mountNamespaces[t.ids.GetMntNsId()] = true
		for i, tid := range t.threads {
			c := t.core
			if i > 0 {
				if c, err = d.core(tid); err != nil {
					return err
				}
			}
			who := t.String()
			if i > 0 {
				who += fmt.Sprintf(" thread %d", tid)
			}
			if err := lim.checkCreds(who, c.GetThreadCore().GetCreds()); err != nil {
				return err
			}
			if err := lim.checkSeccomp(who, c, t.core, filters); err != nil {
				return err
			}
		}
	}
	for id := range mountNamespaces {
		if err := lim.checkMounts(d, fmt.Sprintf("mountpoints-%d.img", id)); err != nil {
			return err
		}
	}
	return checkFiles(d)
}

// exceeds is the error of a field in which the images go beyond the spec.
func exceeds(who, field, format string, a ...any) error {
	return fmt.Errorf("%s: %s: %s: %w", who, field, fmt.Sprintf(format, a...), checkpoint.ErrIncompatible)
}

// limits is what a spec allows.
type limits struct {
	spec     *specs.Spec
	lsm      string // of the images: lsmNone, ...
	bounding uint64
	caps     uint64 // all sets of the spec together
	// gained are the capabilities that some process may hold after an exec with
	// no_new_privs set; with file capabilities these are the permitted ones.
	gained uint64
}

func newLimits(spec *specs.Spec) (*limits, error) {
	l := &limits{spec: spec}
	c := spec.Process.Capabilities
	if c == nil { // runc gives none then
		c = new(specs.LinuxCapabilities)
	}
	var sets [5]uint64
	for i, names := range [][]string{c.Bounding, c.Permitted, c.Inheritable, c.Ambient, c.Effective} {
		for _, name := range names {
			bit := slices.Index(capabilities, strings.TrimPrefix(name, "CAP_"))
			if bit < 0 {
				return nil, fmt.Errorf("spec: capability %q: %w", name, checkpoint.ErrInvalid)
			}
			sets[i] |= 1 << bit
		}
	}
	l.bounding = sets[0]
	l.gained = sets[1] | sets[2] | sets[3] | sets[4]
	l.caps = l.bounding | l.gained
	return l, nil
}

// capabilities are the kernel's, include/uapi/linux/capability.h, by number.
var capabilities = strings.Fields(`
	CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
	NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
	SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
	MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE`)

func capBit(name string) uint64 { return 1 << slices.Index(capabilities, name) }

func capNames(set uint64) string {
	var names []string
	for i := range 64 {
		if set&(1<<i) == 0 {
			continue
		}
		if i < len(capabilities) {
			names = append(names, "CAP_"+capabilities[i])
		} else {
			names = append(names, fmt.Sprintf("capability %d", i))
		}
	}
	return strings.Join(names, ", ")
}

// checkCount compares the number of tasks with the container's limit.
func (l *limits) checkCount(tasks []*task) error {
	r := l.spec.Linux.Resources
	if r == nil || r.Pids == nil || r.Pids.Limit == nil || *r.Pids.Limit <= 0 {
		return nil
	}
	n := int64(0)
	for _, t := range tasks {
		n += max(int64(len(t.threads)), 1)
	}
	if n > *r.Pids.Limit {
		return exceeds("container", "pids", "%d tasks, the limit is %d", n, *r.Pids.Limit)
	}
	return nil
}

// checkNamespaces refuses a process in namespaces of its own, unless it could
// have made them. CRIU knows one user namespace per dump only.
func (l *limits) checkNamespaces(t, root *task) error {
	if t.ids.GetUserNsId() != root.ids.GetUserNsId() {
		return exceeds(t.String(), "user namespace", "not that of the container")
	}
	if l.caps&capBit("SYS_ADMIN") != 0 {
		return nil
	}
	for name, get := range map[string]func(*core.TaskKobjIdsEntry) uint32{
		"pid": (*core.TaskKobjIdsEntry).GetPidNsId, "net": (*core.TaskKobjIdsEntry).GetNetNsId,
		"ipc": (*core.TaskKobjIdsEntry).GetIpcNsId, "uts": (*core.TaskKobjIdsEntry).GetUtsNsId,
		"mnt": (*core.TaskKobjIdsEntry).GetMntNsId, "cgroup": (*core.TaskKobjIdsEntry).GetCgroupNsId,
		"time": (*core.TaskKobjIdsEntry).GetTimeNsId,
	} {
		if get(t.ids) != get(root.ids) {
			return exceeds(t.String(), name+" namespace", "not that of the container, which lacks CAP_SYS_ADMIN")
		}
	}
	return nil
}

// checkCreds compares one thread's credentials.
func (l *limits) checkCreds(who string, c *creds.CredsEntry) error {
	if c == nil || c.Uid == nil || c.Euid == nil || c.Suid == nil || c.Fsuid == nil ||
		c.Gid == nil || c.Egid == nil || c.Sgid == nil || c.Fsgid == nil || c.Secbits == nil {
		return exceeds(who, "credentials", "missing in the image")
	}
	// cap_amb is unknown to go-criu v7.2.0.
	ambient := unknownUints(c, 19)
	for _, s := range []struct {
		name  string
		words []uint32
		limit uint64
	}{
		{"bounding", c.GetCapBnd(), l.bounding},
		{"permitted", c.GetCapPrm(), l.caps},
		{"effective", c.GetCapEff(), l.caps},
		{"inheritable", c.GetCapInh(), l.caps},
		{"ambient", ambient, l.caps},
	} {
		// CRIU reads two words of each set; the ambient one came with 3.16.
		if len(s.words) != 2 && !(s.name == "ambient" && len(s.words) == 0) {
			return exceeds(who, s.name+" capabilities", "%d words in the image, want 2", len(s.words))
		}
		var set uint64
		for i, w := range s.words {
			set |= uint64(w) << (32 * i)
		}
		if extra := set &^ s.limit; extra != 0 {
			return exceeds(who, s.name+" capabilities", "%s beyond the spec", capNames(extra))
		}
	}
	const keepCaps = 1 << 4 // the only securebit that needs no privilege
	if c.GetSecbits()&^keepCaps != 0 && l.caps&capBit("SETPCAP") == 0 {
		return exceeds(who, "securebits", "%#x without CAP_SETPCAP in the spec", c.GetSecbits())
	}
	p := l.spec.Process
	// no_new_privs is unknown to go-criu v7.2.0; CRIU leaves it out when unset.
	nnp, _ := unknownUint(c, 18)
	if p.NoNewPrivileges {
		if nnp != 1 {
			return exceeds(who, "no_new_privs", "not set, the spec demands it")
		}
		// Without new privileges, ids change only by the capability.
		if l.gained&capBit("SETUID") == 0 {
			for _, id := range []uint32{c.GetUid(), c.GetEuid(), c.GetSuid(), c.GetFsuid()} {
				if id != p.User.UID {
					return exceeds(who, "uid", "%d, the spec's user is %d and has neither CAP_SETUID nor new privileges", id, p.User.UID)
				}
			}
		}
		if l.gained&capBit("SETGID") == 0 {
			for _, id := range []uint32{c.GetGid(), c.GetEgid(), c.GetSgid(), c.GetFsgid()} {
				if id != p.User.GID && !slices.Contains(p.User.AdditionalGids, id) {
					return exceeds(who, "gid", "%d, the spec's is %d, without CAP_SETGID or new privileges", id, p.User.GID)
				}
			}
		}
	}
	if l.gained&capBit("SETGID") == 0 && p.NoNewPrivileges {
		for _, id := range c.GetGroups() {
			if id != p.User.GID && !slices.Contains(p.User.AdditionalGids, id) {
				return exceeds(who, "groups", "%d is not among the spec's", id)
			}
		}
	}
	return l.checkProfile(who, c.GetLsmProfile())
}

// checkProfile compares the security profile under which a task ran. Without
// one in the spec, any will do: it can only take rights away.
func (l *limits) checkProfile(who, have string) error {
	p := l.spec.Process
	switch {
	case p.ApparmorProfile != "" && p.ApparmorProfile != "unconfined":
		name, _, _ := strings.Cut(have, " (") // "NAME (enforce)"
		// A profile of one's own child, or stacked on it, takes rights away only.
		if l.lsm != lsmAppArmor || name != p.ApparmorProfile && !strings.HasPrefix(name, p.ApparmorProfile+"//") {
			return exceeds(who, "AppArmor profile", "%q, the spec demands %q", printable([]byte(have)), p.ApparmorProfile)
		}
	case p.SelinuxLabel != "":
		// The categories are chosen anew for each pod.
		if l.lsm != lsmSELinux || selinuxType(have) == "" || selinuxType(have) != selinuxType(p.SelinuxLabel) {
			return exceeds(who, "SELinux label", "%q, the spec demands %q", printable([]byte(have)), p.SelinuxLabel)
		}
	}
	return nil
}

// selinuxType is "user:role:type" of "user:role:type:level".
func selinuxType(label string) string {
	parts := strings.SplitN(label, ":", 4)
	if len(parts) < 3 {
		return ""
	}
	return strings.Join(parts[:3], ":")
}

// seccompFilters reads the flags of each filter in seccomp.img.
func (d *images) seccompFilters() ([]uint32, error) {
	var e seccomp.SeccompEntry
	err := d.one(&e, "seccomp.img", magicCommon, magicSeccomp)
	if absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var flags []uint32
	for _, f := range e.GetSeccompFilters() {
		flags = append(flags, f.GetFlags())
	}
	return flags, nil
}

const magicSeccomp = 0x64413049

// checkSeccomp demands a filter on every thread where the spec has one. Where
// all threads of a process have the same filters, CRIU writes them for the first
// thread only and marks them to be synchronized to the others (CRIU
// criu/seccomp.c:try_use_tsync).
func (l *limits) checkSeccomp(who string, c, first *core.CoreEntry, filters []uint32) error {
	// The condition of runc, libcontainer/specconv:SetupSeccomp.
	s := l.spec.Linux.Seccomp
	if s == nil || s.DefaultAction == "" && len(s.Syscalls) == 0 {
		return nil
	}
	const tsync = 1 // SECCOMP_FILTER_FLAG_TSYNC
	filtered := func(c *core.CoreEntry) (flags uint32, ok bool) {
		t := c.GetThreadCore()
		if t.GetSeccompMode() != core.SeccompMode_filter || t.SeccompFilter == nil {
			return 0, false
		}
		if n := int(t.GetSeccompFilter()); n < len(filters) {
			return filters[n], true
		}
		return 0, false
	}
	if _, ok := filtered(c); ok {
		return nil
	}
	if flags, ok := filtered(first); ok && flags&tsync != 0 {
		return nil
	}
	return exceeds(who, "seccomp", "no filter, the spec demands one")
}

// fsTypes are the file systems that a mount of each type of the spec may be in
// the images. Bind mounts are external: their source comes from the runtime.
var fsTypes = map[string][]mnt.Fstype{
	"proc":   {mnt.Fstype_PROC},
	"sysfs":  {mnt.Fstype_SYSFS},
	"tmpfs":  {mnt.Fstype_TMPFS},
	"devpts": {mnt.Fstype_DEVPTS},
	"mqueue": {mnt.Fstype_MQUEUE},
	// Version 1 is a tmpfs with one mount for each controller.
	"cgroup":  {mnt.Fstype_CGROUP, mnt.Fstype_CGROUP2, mnt.Fstype_TMPFS},
	"cgroup2": {mnt.Fstype_CGROUP2},
}

// checkMounts compares the mounts of a mount namespace with the spec's. CRIU
// mounts again what is not external, with the images' type and options, so
// those must be of a kind and at a place that the spec or runc asks for.
func (l *limits) checkMounts(d *images, name string) error {
	// What the spec mounts, by destination; entries are taken out as they are
	// found, for a destination that leads through a symbolic link of the image
	// (/var/run) lies elsewhere in the images.
	dest := map[string]specs.Mount{}
	for _, m := range l.spec.Mounts {
		dest[path.Clean("/"+m.Destination)] = m
	}
	left := maps.Clone(dest)
	devices := map[string]bool{"/dev/null": true} // runc binds it over masked files
	for _, dev := range l.spec.Linux.Devices {
		devices[path.Clean("/"+dev.Path)] = true
	}
	var others []*mnt.MntEntry
	count := 0
	err := each(d, name, magicMounts, new(mnt.MntEntry), func(e *mnt.MntEntry) error {
		if count++; count > maxTasks {
			return d.corrupt(name, "more than %d mounts", maxTasks)
		}
		at := path.Clean("/" + e.GetMountpoint())
		if hasDotDot(e.GetMountpoint()) || hasDotDot(e.GetRoot()) || hasDotDot(e.GetExtKey()) {
			return exceeds("mount "+printable([]byte(at)), "path", "contains \"..\"")
		}
		if at == "/" { // given by the runtime
			return nil
		}
		if m, ok := dest[at]; ok && mountFits(e, m) {
			delete(left, at)
			return nil
		}
		if e.GetExtKey() != "" && devices[e.GetExtKey()] || l.runtimeMount(e, at, dest) {
			return nil
		}
		others = append(others, &mnt.MntEntry{Mountpoint: &at, Fstype: e.Fstype, ExtKey: e.ExtKey, WithPlugin: e.WithPlugin})
		return nil
	})
	if err != nil {
		return err
	}
	if count == 0 {
		return d.corrupt(name, "no mounts")
	}
others:
	for _, e := range others {
		for at, m := range left {
			if mountFits(e, m) {
				delete(left, at)
				continue others
			}
		}
		// With this capability the container may mount by itself.
		if l.caps&capBit("SYS_ADMIN") != 0 && e.GetExtKey() == "" && memoryFS(fstype(e)) {
			continue
		}
		return exceeds("container", "mounts", "%s (%s, key %q) is not in the spec",
			printable([]byte(e.GetMountpoint())), strings.ToLower(fstype(e).String()), printable([]byte(e.GetExtKey())))
	}
	return nil
}

// mountFits tells whether a mount in the images can be the spec's m.
func mountFits(e *mnt.MntEntry, m specs.Mount) bool {
	if e.GetWithPlugin() {
		return false
	}
	if isBind(m) {
		return e.GetExtKey() != ""
	}
	return e.GetExtKey() == "" && slices.Contains(fsTypes[m.Type], fstype(e))
}

func fstype(e *mnt.MntEntry) mnt.Fstype { return mnt.Fstype(e.GetFstype()) }

func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

func memoryFS(t mnt.Fstype) bool {
	return t == mnt.Fstype_TMPFS || t == mnt.Fstype_PROC || t == mnt.Fstype_DEVPTS || t == mnt.Fstype_MQUEUE
}

// runtimeMount tells whether runc makes such a mount for this spec: the console,
// a masked directory, a read-only path bound over itself, or one below the
// mount of the cgroups or below a recursive bind.
func (l *limits) runtimeMount(e *mnt.MntEntry, at string, dest map[string]specs.Mount) bool {
	if e.GetWithPlugin() {
		return false
	}
	clean := func(p string) string { return path.Clean("/" + p) }
	if e.GetExtKey() == "" {
		switch {
		case at == "/dev/console" && l.spec.Process.Terminal && fstype(e) == mnt.Fstype_DEVPTS:
			return true
		case fstype(e) == mnt.Fstype_TMPFS && slices.ContainsFunc(l.spec.Linux.MaskedPaths, func(p string) bool { return clean(p) == at }):
			return true
		case (fstype(e) == mnt.Fstype_PROC || fstype(e) == mnt.Fstype_SYSFS) &&
			slices.ContainsFunc(l.spec.Linux.ReadonlyPaths, func(p string) bool { return clean(p) == at }):
			return true
		}
	}
	for d := path.Dir(at); d != "/"; d = path.Dir(d) {
		m, ok := dest[d]
		if !ok {
			continue
		}
		if m.Type == "cgroup" {
			return fstype(e) == mnt.Fstype_CGROUP || fstype(e) == mnt.Fstype_CGROUP2
		}
		return e.GetExtKey() != "" && slices.Contains(m.Options, "rbind")
	}
	return false
}

// checkFiles refuses names of files that climb out of where they begin.
func checkFiles(d *images) error {
	const name = "files.img"
	return each(d, name, magicFiles, new(fdinfo.FileEntry), checkFile)
}

func checkFile(e *fdinfo.FileEntry) error {
	if p := e.GetReg().GetName(); hasDotDot(p) {
		return exceeds("container", "open file", "%q contains \"..\"", printable([]byte(p)))
	}
	if p := string(e.GetUsk().GetName()); strings.HasPrefix(p, "/") && hasDotDot(strings.TrimRight(p, "\x00")) {
		return exceeds("container", "unix socket", "%q contains \"..\"", printable([]byte(p)))
	}
	return nil
}

func hasDotDot(p string) bool { return slices.Contains(strings.Split(p, "/"), "..") }
