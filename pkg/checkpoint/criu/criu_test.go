package criu

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/creds"
	core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/utsns"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

const sample = "testdata/criu42"

func loadSpec(t *testing.T) *specs.Spec {
	t.Helper()
	b, err := os.ReadFile("testdata/criu42-spec.json")
	if err != nil {
		t.Fatal(err)
	}
	s := new(specs.Spec)
	if err := json.Unmarshal(b, s); err != nil {
		t.Fatal(err)
	}
	return s
}

// copyImages returns a copy of the sample that a test may damage.
func copyImages(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(sample)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// viewOf is a view of the images, for a restore that changes some.
func viewOf(t *testing.T, images string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "view")
	if err := LinkImages(images, dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// encode makes an image of messages.
func encode(t testing.TB, magic uint32, ms ...proto.Message) []byte {
	t.Helper()
	b := binary.LittleEndian.AppendUint32(nil, magicCommon)
	b = binary.LittleEndian.AppendUint32(b, magic)
	for _, m := range ms {
		p, err := proto.MarshalOptions{AllowPartial: true}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		b = append(binary.LittleEndian.AppendUint32(b, uint32(len(p))), p...)
	}
	return b
}

// edit changes every message of an image.
func edit[M proto.Message](t *testing.T, dir, name string, magic uint32, m M, f func(M)) {
	t.Helper()
	d, err := openImages(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var ms []proto.Message
	if err := each(d, name, magic, m, func(m M) error {
		c := proto.Clone(m).(M)
		f(c)
		ms = append(ms, c)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, name), encode(t, magic, ms...))
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestInspect(t *testing.T) {
	r, err := Inspect(sample)
	if err != nil {
		t.Fatal(err)
	}
	if r.Inventory.ImageVersion != 2 || !r.Inventory.TCPClose || r.Inventory.LSM != "none" || len(r.Inventory.RunID) != 36 {
		t.Errorf("inventory %+v", r.Inventory)
	}
	if r.Hostname != "oldpod" || r.MemoryBytes != 2*4096 || len(r.SysVIPC) != 0 {
		t.Errorf("hostname %q, memory %d, ipc %v", r.Hostname, r.MemoryBytes, r.SysVIPC)
	}
	if len(r.Processes) != 3 {
		t.Fatalf("%d processes", len(r.Processes))
	}
	root, child, zombie := r.Processes[0], r.Processes[1], r.Processes[2]
	if root.PID != 1 || root.PPID != 0 || root.Comm != "app" || root.State != "alive" || root.Exe != "/app" || !reflect.DeepEqual(root.Threads, []uint32{1, 6}) {
		t.Errorf("root %+v", root)
	}
	if child.PID != 7 || child.PPID != 1 || child.State != "alive" {
		t.Errorf("child %d of %d, %s", child.PID, child.PPID, child.State)
	}
	if zombie.PID != 8 || zombie.State != "zombie" || zombie.Threads != nil {
		t.Errorf("zombie %+v", zombie)
	}

	// The program dirtied 64 KiB of a mapping of 1 MiB.
	var found bool
	var sum uint64
	kinds := map[string]int{}
	for _, m := range root.Mappings {
		kinds[m.Kind]++
		sum += m.ResidentBytes
		if m.Kind == "anon" && m.SizeBytes == 1<<20 && m.ResidentBytes == 64<<10 && m.LazyBytes == 64<<10 && m.Prot == "rw-p" {
			found = true
		}
	}
	if !found {
		t.Errorf("no mapping of 1 MiB with 64 KiB in the images: %+v", root.Mappings)
	}
	if root.ResidentBytes != 33*4096 || sum != root.ResidentBytes {
		t.Errorf("resident %d, sum over mappings %d, want %d", root.ResidentBytes, sum, 33*4096)
	}
	// CRIU dumps shared anonymous memory as a memfd.
	for _, k := range []string{"anon", "file", "memfd", "stack", "vdso", "vvar", "heap"} {
		if kinds[k] == 0 {
			t.Errorf("no mapping of kind %s: %v", k, kinds)
		}
	}

	files := map[uint32]OpenFile{}
	for _, f := range root.Files {
		files[f.FD] = f
	}
	if f := files[3]; f.Path != "/tmp/ghost" || f.Type != "reg" || f.Offset != 5 || !f.Unlinked || f.Flags&syscall.O_RDWR == 0 {
		t.Errorf("unlinked file %+v", f)
	}
	if f := files[4]; f.Path != "/tmp/locked" || f.Unlinked {
		t.Errorf("file with a lock %+v", f)
	}
	if f := files[6]; f.Path != "tcp 0.0.0.0:8080 listen" || f.Type != "inetsk" {
		t.Errorf("listening socket %+v", f)
	}
	var sockets []string
	for _, s := range r.Sockets {
		sockets = append(sockets, s.String())
	}
	got := strings.Join(sockets, "\n")
	for _, want := range []string{"tcp 0.0.0.0:8080 listen", "tcp 127.0.0.1:8080 -> 127.0.0.1:", "established", "udp [::]:53 close", "unix /tmp/sock listen"} {
		if !strings.Contains(got, want) {
			t.Errorf("no socket %q in\n%s", want, got)
		}
	}
	if b, err := json.Marshal(r); err != nil || !bytes.Contains(b, []byte(`"residentBytes"`)) {
		t.Errorf("JSON: %v", err)
	}
}

func runs(t *testing.T, b []byte) (rs []run) {
	t.Helper()
	img, err := newImage(&images{}, "pagemap-1.img", bytes.NewReader(b), int64(len(b)), magicCommon, magicPagemap)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.pagemap(func(r run) error { rs = append(rs, r); return nil }); err != nil {
		t.Fatal(err)
	}
	return rs
}

// TestPagemapKinds reads the same pagemap as CRIU 4.2 and as older ones write it.
func TestPagemapKinds(t *testing.T) {
	b, err := os.ReadFile(sample + "/pagemap-1.img")
	if err != nil {
		t.Fatal(err)
	}
	now := runs(t, b)
	var sum uint64
	old := []proto.Message{&pagemap.PagemapHead{PagesId: proto.Uint32(2)}}
	older := []proto.Message{old[0]}
	for _, r := range now {
		sum += r.pages
		old = append(old, &pagemap.PagemapEntry{Vaddr: &r.addr, NrPages: proto.Uint32(uint32(r.pages)), Flags: &r.flags})
		older = append(older, &pagemap.PagemapEntry{Vaddr: &r.addr, NrPages: proto.Uint32(uint32(r.pages)), InParent: proto.Bool(false)})
	}
	if sum != 33 {
		t.Errorf("CRIU 4.2: %d pages, want 33", sum)
	}
	if got := runs(t, encode(t, magicPagemap, old...)); !reflect.DeepEqual(got, now) {
		t.Errorf("field 2: %v, want %v", got, now)
	}
	for _, r := range runs(t, encode(t, magicPagemap, older...)) {
		if r.flags != pagePresent {
			t.Errorf("without flags: %+v", r)
		}
	}
	// More pages than field 2 can hold.
	huge := &pagemap.PagemapEntry{Vaddr: proto.Uint64(0x1000), NrPages: proto.Uint32(0), Flags: proto.Uint32(pagePresent)}
	huge.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 5, protowire.VarintType), 1<<33))
	if got := runs(t, encode(t, magicPagemap, old[0], huge)); len(got) != 1 || got[0].pages != 1<<33 {
		t.Errorf("2^33 pages: %v", got)
	}
}

func TestHostileImages(t *testing.T) {
	le := func(vs ...uint32) (b []byte) {
		for _, v := range vs {
			b = binary.LittleEndian.AppendUint32(b, v)
		}
		return b
	}
	entry := func(addr uint64, pages uint32) proto.Message {
		return &pagemap.PagemapEntry{Vaddr: &addr, NrPages: &pages, Flags: proto.Uint32(pagePresent)}
	}
	head := &pagemap.PagemapHead{PagesId: proto.Uint32(1)}
	ps := func(pid, ppid uint32, threads ...uint32) proto.Message {
		return &pstree.PstreeEntry{Pid: &pid, Ppid: &ppid, Pgid: &pid, Sid: &pid, Threads: threads}
	}
	for name, tc := range map[string]struct {
		file    string
		content []byte
	}{
		"empty":                 {"pstree.img", nil},
		"head only":             {"pstree.img", le(magicCommon, magicPstree)},
		"wrong magic":           {"pstree.img", le(magicCommon, magicCore)},
		"truncated length":      {"pstree.img", append(le(magicCommon, magicPstree), 1, 2)},
		"length beyond the end": {"pstree.img", le(magicCommon, magicPstree, 0xffffffff, 0)},
		"length of 2 GiB":       {"core-1.img", le(magicCommon, magicCore, 0x7fffffff)},
		"not a message":         {"core-1.img", append(le(magicCommon, magicCore, 4), 0xff, 0xff, 0xff, 0xff)},
		"empty core":            {"core-1.img", le(magicCommon, magicCore, 0)},
		"pid twice":             {"pstree.img", encode(t, magicPstree, ps(1, 0, 1), ps(1, 1, 1))},
		"pid 0":                 {"pstree.img", encode(t, magicPstree, ps(0, 0, 0))},
		"no parent":             {"pstree.img", encode(t, magicPstree, ps(1, 0, 1), ps(7, 9, 7))},
		"two roots":             {"pstree.img", encode(t, magicPstree, ps(1, 0, 1), ps(7, 0, 7))},
		"no threads":            {"pstree.img", encode(t, magicPstree, ps(1, 0))},
		"foreign thread":        {"pstree.img", encode(t, magicPstree, ps(1, 0, 6, 1))},
		"unaligned page":        {"pagemap-1.img", encode(t, magicPagemap, head, entry(0x1001, 1))},
		"no pages":              {"pagemap-1.img", encode(t, magicPagemap, head, entry(0x1000, 0))},
		"overlapping runs":      {"pagemap-1.img", encode(t, magicPagemap, head, entry(0x1000, 2), entry(0x2000, 1))},
		"address wraps":         {"pagemap-1.img", encode(t, magicPagemap, head, entry(0xfffffffffffff000, 2))},
		"no pagemap head":       {"pagemap-1.img", le(magicCommon, magicPagemap)},
		"file id twice":         {"files.img", encode(t, magicFiles, &fdinfo.FileEntry{Id: proto.Uint32(1)}, &fdinfo.FileEntry{Id: proto.Uint32(1)})},
		"inventory version":     {"inventory.img", append(le(magicInventory, 2), 8, 1)},
		"empty names":           {"utsns-12.img", le(magicCommon, magicUTS)},
	} {
		t.Run(name, func(t *testing.T) {
			dir := copyImages(t)
			write(t, filepath.Join(dir, tc.file), tc.content)
			if _, err := Inspect(dir); !errors.Is(err, checkpoint.ErrCorrupt) || !strings.Contains(err.Error(), tc.file) {
				t.Errorf("error %v, want corrupt %s", err, tc.file)
			}
		})
	}
	for name, spoil := range map[string]func(path string) error{
		"link":      func(p string) error { return os.Symlink("/etc/passwd", p) },
		"fifo":      func(p string) error { return syscall.Mkfifo(p, 0o600) },
		"directory": func(p string) error { return os.Mkdir(p, 0o700) },
		"too large": func(p string) error {
			f, err := os.Create(p)
			if err != nil {
				return err
			}
			return errors.Join(f.Truncate(maxImageBytes+1), f.Close())
		},
	} {
		for _, file := range []string{"files.img", "utsns-12.img"} {
			t.Run(name+" "+file, func(t *testing.T) {
				dir := copyImages(t)
				p := filepath.Join(dir, file)
				if err := errors.Join(os.Remove(p), spoil(p)); err != nil {
					t.Fatal(err)
				}
				done := make(chan error, 1)
				go func() { _, err := Inspect(dir); done <- err }()
				select {
				case err := <-done:
					if !errors.Is(err, checkpoint.ErrCorrupt) {
						t.Errorf("error %v, want corrupt", err)
					}
				case <-time.After(10 * time.Second):
					t.Fatal("blocked")
				}
			})
		}
	}
	link := filepath.Join(t.TempDir(), "link")
	abs, _ := filepath.Abs(sample)
	if err := os.Symlink(abs, link); err != nil {
		t.Fatal(err)
	}
	if _, err := Inspect(link); err == nil {
		t.Error("an image directory behind a link was read")
	}
}

func TestCheckAgainstSpecAccepts(t *testing.T) {
	if err := CheckAgainstSpec(sample, loadSpec(t)); err != nil {
		t.Fatal(err)
	}
	// Another pod's spec may give more.
	s := loadSpec(t)
	s.Process.Capabilities.Bounding = append(s.Process.Capabilities.Bounding, "CAP_NET_ADMIN")
	s.Process.NoNewPrivileges = false
	s.Linux.Seccomp = nil
	if err := CheckAgainstSpec(sample, s); err != nil {
		t.Fatal(err)
	}
}

func TestCheckAgainstSpecRefuses(t *testing.T) {
	all := func(c *specs.LinuxCapabilities, set []string) {
		c.Bounding, c.Permitted, c.Effective, c.Inheritable, c.Ambient = set, set, set, nil, nil
	}
	for name, tc := range map[string]struct {
		change func(*specs.Spec)
		want   string
	}{
		"bounding":    {func(s *specs.Spec) { s.Process.Capabilities.Bounding = []string{"CAP_KILL"} }, "bounding capabilities"},
		"no caps":     {func(s *specs.Spec) { s.Process.Capabilities = nil }, "capabilities"},
		"one cap":     {func(s *specs.Spec) { all(s.Process.Capabilities, []string{"CAP_KILL"}) }, "CAP_NET_BIND_SERVICE"},
		"user":        {func(s *specs.Spec) { s.Process.User.UID = 1000 }, "process 1 (app): uid"},
		"group":       {func(s *specs.Spec) { s.Process.User.GID = 1000 }, "process 1 (app): gid"},
		"mount":       {func(s *specs.Spec) { s.Mounts = s.Mounts[:len(s.Mounts)-1] }, "/run/secrets/sa"},
		"mount kind":  {func(s *specs.Spec) { s.Mounts[0].Type = "tmpfs" }, "mounts: /proc"},
		"bind":        {func(s *specs.Spec) { s.Mounts[len(s.Mounts)-2].Destination = "/elsewhere" }, ""},
		"masked":      {func(s *specs.Spec) { s.Linux.MaskedPaths = nil }, "mounts: /"},
		"pids":        {func(s *specs.Spec) { s.Linux.Resources = pids(3) }, "pids"},
		"apparmor":    {func(s *specs.Spec) { s.Process.ApparmorProfile = "cri-containerd.apparmor.d" }, "AppArmor"},
		"selinux":     {func(s *specs.Spec) { s.Process.SelinuxLabel = "system_u:system_r:container_t:s0:c1,c2" }, "SELinux"},
		"no process":  {func(s *specs.Spec) { s.Process = nil }, "without process"},
		"unknown cap": {func(s *specs.Spec) { s.Process.Capabilities.Bounding = []string{"CAP_FLY"} }, "CAP_FLY"},
	} {
		t.Run(name, func(t *testing.T) {
			s := loadSpec(t)
			tc.change(s)
			err := CheckAgainstSpec(sample, s)
			if tc.want == "" { // only the place differs, as behind a link of the root file system
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.Is(err, checkpoint.ErrIncompatible) && !errors.Is(err, checkpoint.ErrInvalid) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}

func pids(n int64) *specs.LinuxResources {
	return &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &n}}
}

// TestCheckAgainstSpecImages changes the images instead of the spec.
func TestCheckAgainstSpecImages(t *testing.T) {
	// creds changes the credentials of one thread.
	cred := func(tid string, f func(*creds.CredsEntry)) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			edit(t, dir, "core-"+tid+".img", magicCore, new(core.CoreEntry), func(c *core.CoreEntry) { f(c.ThreadCore.Creds) })
		}
	}
	mount := func(f func(*mnt.MntEntry)) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			edit(t, dir, "mountpoints-13.img", magicMounts, new(mnt.MntEntry), f)
		}
	}
	for name, tc := range map[string]struct {
		change func(*testing.T, string)
		want   string
	}{
		"thread's bounding set": {cred("6", func(c *creds.CredsEntry) { c.CapBnd[0] |= 1 << 21 }), "process 1 (app) thread 6: bounding capabilities: CAP_SYS_ADMIN"},
		"child's effective set": {cred("7", func(c *creds.CredsEntry) { c.CapEff[0] |= 1 << 12 }), "process 7 (app): effective capabilities: CAP_NET_ADMIN"},
		"unknown capability":    {cred("1", func(c *creds.CredsEntry) { c.CapPrm[1] |= 1 << 31 }), "capability 63"},
		"missing set":           {cred("1", func(c *creds.CredsEntry) { c.CapBnd = nil }), "0 words"},
		"ambient set": {cred("1", func(c *creds.CredsEntry) {
			setUnknown(c, 19, 1<<21, 0)
		}), "ambient capabilities: CAP_SYS_ADMIN"},
		"no new privileges": {cred("7", func(c *creds.CredsEntry) { dropUnknown(c, 18) }), "process 7 (app): no_new_privs"},
		"thread's user":     {cred("6", func(c *creds.CredsEntry) { c.Suid = proto.Uint32(5) }), "thread 6: uid"},
		"group":             {cred("6", func(c *creds.CredsEntry) { c.Groups = []uint32{42} }), "thread 6: groups"},
		"securebits":        {cred("6", func(c *creds.CredsEntry) { c.Secbits = proto.Uint32(1) }), "securebits"},
		"absent user":       {cred("6", func(c *creds.CredsEntry) { c.Fsuid = nil }), "credentials"},
		"process without a filter": {func(t *testing.T, dir string) {
			edit(t, dir, "core-7.img", magicCore, new(core.CoreEntry), func(c *core.CoreEntry) { c.ThreadCore.SeccompMode = nil })
		}, "process 7 (app): seccomp"},
		"leader without a filter": {func(t *testing.T, dir string) {
			edit(t, dir, "core-1.img", magicCore, new(core.CoreEntry), func(c *core.CoreEntry) { c.ThreadCore.SeccompMode = nil })
		}, "process 1 (app): seccomp"},
		"filter that does not exist": {func(t *testing.T, dir string) {
			edit(t, dir, "core-1.img", magicCore, new(core.CoreEntry), func(c *core.CoreEntry) { c.ThreadCore.SeccompFilter = proto.Uint32(9) })
		}, "process 1 (app): seccomp"},
		"no filters": {func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "seccomp.img")) }, "seccomp"},
		"user namespace": {func(t *testing.T, dir string) {
			edit(t, dir, "ids-7.img", magicIDs, new(core.TaskKobjIdsEntry), func(c *core.TaskKobjIdsEntry) { c.UserNsId = proto.Uint32(99) })
		}, "user namespace"},
		"net namespace": {func(t *testing.T, dir string) {
			edit(t, dir, "ids-7.img", magicIDs, new(core.TaskKobjIdsEntry), func(c *core.TaskKobjIdsEntry) { c.NetNsId = proto.Uint32(99) })
		}, "net namespace"},
		"mount elsewhere": {mount(func(e *mnt.MntEntry) {
			if e.GetMountpoint() == "/dev/shm" {
				e.Mountpoint = proto.String("/host")
			}
		}), ""}, // the same kind of mount at another place gives nothing more
		"disk": {mount(func(e *mnt.MntEntry) {
			if e.GetMountpoint() == "/dev/shm" {
				e.Fstype = proto.Uint32(uint32(mnt.Fstype_AUTO))
			}
		}), "/dev/shm"},
		"bind without a key": {mount(func(e *mnt.MntEntry) {
			if e.GetMountpoint() == "/etc/resolv.conf" {
				e.ExtKey = nil
			}
		}), "/etc/resolv.conf"},
		"climbing mount": {mount(func(e *mnt.MntEntry) {
			if e.GetMountpoint() == "/etc/resolv.conf" {
				e.Mountpoint = proto.String("/../../etc")
			}
		}), `contains ".."`},
		"climbing file": {func(t *testing.T, dir string) {
			edit(t, dir, "files.img", magicFiles, new(fdinfo.FileEntry), func(e *fdinfo.FileEntry) {
				if e.Reg != nil {
					e.Reg.Name = proto.String("/tmp/../../etc/shadow")
				}
			})
		}, `contains ".."`},
	} {
		t.Run(name, func(t *testing.T) {
			s := loadSpec(t)
			// The sample's spec gives neither of them to begin with.
			dir := copyImages(t)
			tc.change(t, dir)
			err := CheckAgainstSpec(dir, s)
			if tc.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.Is(err, checkpoint.ErrIncompatible) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}

func dropUnknown(m proto.Message, field protowire.Number) {
	var kept []byte
	for b := m.ProtoReflect().GetUnknown(); len(b) > 0; {
		num, _, n := protowire.ConsumeField(b)
		if num != field {
			kept = append(kept, b[:n]...)
		}
		b = b[n:]
	}
	m.ProtoReflect().SetUnknown(kept)
}

func setUnknown(m proto.Message, field protowire.Number, vs ...uint64) {
	dropUnknown(m, field)
	b := m.ProtoReflect().GetUnknown()
	for _, v := range vs {
		b = protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), v)
	}
	m.ProtoReflect().SetUnknown(b)
}

func TestRewriteHostname(t *testing.T) {
	dir := copyImages(t)
	before, err := os.ReadFile(dir + "/utsns-12.img")
	if err != nil {
		t.Fatal(err)
	}
	if err := RewriteHostname(dir, "web-1"); err != nil {
		t.Fatal(err)
	}
	r, err := Inspect(dir)
	if err != nil {
		t.Fatal(err)
	}
	if r.Hostname != "web-1" {
		t.Errorf("hostname %q", r.Hostname)
	}
	after, _ := os.ReadFile(dir + "/utsns-12.img")
	if !bytes.Equal(after[:8], before[:8]) || !bytes.Equal(after, encode(t, magicUTS, &utsns.UtsnsEntry{Nodename: proto.String("web-1"), Domainname: proto.String("(none)")})) {
		t.Errorf("image is %q, was %q", after, before)
	}
	if st, _ := os.Stat(dir + "/utsns-12.img"); st.Mode() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	if m, _ := filepath.Glob(dir + "/.*"); len(m) != 0 {
		t.Errorf("left behind: %v", m)
	}
	for _, bad := range []string{"", strings.Repeat("a", 65), "a b", "a\nb", "a/b", "é"} {
		if err := RewriteHostname(dir, bad); !errors.Is(err, checkpoint.ErrInvalid) {
			t.Errorf("host name %q: %v", bad, err)
		}
	}
	if err := RewriteHostname(t.TempDir(), "x"); err != nil {
		t.Errorf("without an image: %v", err)
	}
	write(t, dir+"/utsns-12.img", before[:9])
	if err := RewriteHostname(dir, "x"); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("damaged image: %v", err)
	}
}

func TestLinkImages(t *testing.T) {
	images := copyImages(t)
	bundle := filepath.Join(t.TempDir(), "a", "b")
	if err := os.MkdirAll(bundle, 0o700); err != nil {
		t.Fatal(err)
	}
	// A path through a link, like /var/run.
	alias := filepath.Join(t.TempDir(), "alias")
	if err := os.Symlink(bundle, alias); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(alias, "images")
	if err := LinkImages(images, dir); err != nil {
		t.Fatal(err)
	}
	before, _ := os.ReadFile(images + "/utsns-12.img")
	if err := RewriteHostname(dir, "web-1"); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.ReadFile(images + "/utsns-12.img"); !bytes.Equal(after, before) {
		t.Error("the original was changed")
	}
	entries, err := os.ReadDir(images)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if e.Name() == "utsns-12.img" {
			if err == nil {
				t.Error("utsns-12.img is a link")
			}
			continue
		}
		if err != nil || filepath.IsAbs(target) {
			t.Errorf("%s: link to %q, %v", e.Name(), target, err)
		}
		want, _ := os.ReadFile(filepath.Join(images, e.Name()))
		if got, err := os.ReadFile(filepath.Join(dir, e.Name())); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v", e.Name(), err)
		}
	}
	if err := LinkImages(images, dir); !errors.Is(err, os.ErrExist) {
		t.Errorf("existing directory: %v", err)
	}
	if err := os.Symlink("/etc/passwd", images+"/core-9.img"); err != nil {
		t.Fatal(err)
	}
	if err := LinkImages(images, dir+"2"); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("image that is a link: %v", err)
	}
}

func TestReadDumpStats(t *testing.T) {
	s, err := ReadDumpStats(sample)
	if err != nil {
		t.Fatal(err)
	}
	want := DumpStats{
		Freezing: 101491 * time.Microsecond, Frozen: 163413 * time.Microsecond, MemDump: 1083 * time.Microsecond, MemWrite: 180 * time.Microsecond,
		PagesScanned: 86, PagesWritten: 66, ShmemWritten: 1,
	}
	if s != want {
		t.Errorf("got %+v, want %+v", s, want)
	}
	if _, err := ReadDumpStats(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
}

func TestLogErrors(t *testing.T) {
	const log = `(00.000001) Version: 4.2.1
(00.054945) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
(00.054992) Running pre-dump scripts
(00.083384) 1
(00.083391) 2
(00.083401) 3
(00.083411) dumping /proc/58/oom_score_adj
(00.083427) Error (criu/cr-dump.c:389): Can't get rlimit 0: Operation not permitted
(00.083429) ----------------------------------------
(00.083431) Error (criu/cr-dump.c:1584): Dump core (pid: 58) failed with -1 ` + "\x1b[31m" + `
(00.084192) 	RPC
`
	path := filepath.Join(t.TempDir(), "dump.log")
	write(t, path, []byte(log))
	got, err := LogErrors(path, 10)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"(00.083401) 3",
		"(00.083411) dumping /proc/58/oom_score_adj",
		"(00.083427) Error (criu/cr-dump.c:389): Can't get rlimit 0: Operation not permitted",
		"(00.083429) ----------------------------------------",
		"(00.083431) Error (criu/cr-dump.c:1584): Dump core (pid: 58) failed with -1 ?[31m",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if got, _ := LogErrors(path, 1); len(got) != 1 || got[0] != want[4] {
		t.Errorf("last line: %q", got)
	}
	// Only the end of a large log is read.
	write(t, path, append(bytes.Repeat([]byte("Error (x): early\n"), maxLogTail/8), "Error (y): late\n"...))
	if got, err := LogErrors(path, 1); err != nil || len(got) != 1 || got[0] != "Error (y): late" {
		t.Errorf("large log: %q, %v", got, err)
	}
	if got, err := LogErrors(filepath.Join(t.TempDir(), "none"), 5); err != nil || got != nil {
		t.Errorf("absent log: %q, %v", got, err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if _, err := LogErrors(link, 5); err == nil {
		t.Error("a link was followed")
	}
}

func TestConfig(t *testing.T) {
	for _, tc := range []struct {
		o    ConfigOptions
		want string
	}{
		{ConfigOptions{}, ""},
		{DumpOptions(checkpoint.TCPClose), "tcp-close\nskip-in-flight\nfile-locks\next-unix-sk\nghost-limit 67108864\n"},
		{DumpOptions(checkpoint.TCPKeep), "tcp-established\nskip-in-flight\nfile-locks\next-unix-sk\nghost-limit 67108864\n"},
		{RestoreOptions(checkpoint.TCPClose, true), "tcp-close\nfile-locks\next-unix-sk\nlazy-pages\n"},
		{ConfigOptions{TCPClose: true, SkipNetworkLock: true}, "tcp-close\nnetwork-lock skip\n"},
		{ConfigOptions{Timeout: 1500 * time.Millisecond, LinkRemap: true, ShellJob: true}, "link-remap\nshell-job\ntimeout 2\n"},
		{ConfigOptions{External: map[string]string{"b": "/y/b", "a": "/y/a"}}, "external mnt[a]:/y/a\nexternal mnt[b]:/y/b\n"},
	} {
		if got := Config(tc.o); got != tc.want {
			t.Errorf("%+v: %q, want %q", tc.o, got, tc.want)
		}
	}
}

func TestCanSkipNetworkLock(t *testing.T) {
	for version, want := range map[string]bool{"4.2.1": true, "4.3": true, "5.0": true, "4.2": false, "3.17.1": false, "": false, "git": false} {
		if got := CanSkipNetworkLock(version); got != want {
			t.Errorf("%q: %v", version, got)
		}
	}
}

func TestCheckHost(t *testing.T) {
	host := func(f func(*checkpoint.Host)) checkpoint.Host {
		h := checkpoint.Host{Arch: "amd64", CRIUVersion: "4.2.1", CPUFlags: []string{"avx", "sse2"}, KernelRelease: "6.12", BootID: "a"}
		if f != nil {
			f(&h)
		}
		return h
	}
	for name, tc := range map[string]struct {
		recorded, live checkpoint.Host
		want           string
	}{
		"same":         {host(nil), host(nil), ""},
		"newer":        {host(nil), host(func(h *checkpoint.Host) { h.CRIUVersion, h.KernelRelease, h.BootID = "4.3", "7.2", "b" }), ""},
		"more flags":   {host(nil), host(func(h *checkpoint.Host) { h.CPUFlags = append(h.CPUFlags, "avx2") }), ""},
		"kernel's own": {host(func(h *checkpoint.Host) { h.CPUFlags = append(h.CPUFlags, "ibrs") }), host(nil), ""},
		"arch":         {host(nil), host(func(h *checkpoint.Host) { h.Arch = "arm64" }), "arch:"},
		"no arch":      {host(func(h *checkpoint.Host) { h.Arch = "" }), host(func(h *checkpoint.Host) { h.Arch = "" }), "arch:"},
		"older CRIU":   {host(nil), host(func(h *checkpoint.Host) { h.CRIUVersion = "4.2" }), "criuVersion:"},
		"odd CRIU":     {host(func(h *checkpoint.Host) { h.CRIUVersion = "git" }), host(nil), "criuVersion:"},
		"less flags":   {host(nil), host(func(h *checkpoint.Host) { h.CPUFlags = []string{"sse2"} }), "lacks avx"},
		"no flags":     {host(func(h *checkpoint.Host) { h.CPUFlags = nil }), host(nil), "cpuFlags:"},
	} {
		err := CheckHost(tc.recorded, tc.live)
		if tc.want == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		} else if !errors.Is(err, checkpoint.ErrIncompatible) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

func TestCPUFlags(t *testing.T) {
	got, err := parseCPUFlags(strings.NewReader("processor : 0\nflags\t\t: sse2 avx ibrs fpu\n\nflags : fpu sse2\n"), userFlags["amd64"])
	if err != nil || !reflect.DeepEqual(got, []string{"fpu", "sse2"}) {
		t.Errorf("got %v, %v: want what all CPUs have, sorted", got, err)
	}
	if flags, err := CPUFlags(); err != nil || len(flags) == 0 {
		t.Errorf("this machine: %v, %v", flags, err)
	}
}

func TestHostFactsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "stasis", "host.json")
	if _, err := ReadHostFacts(path); !errors.Is(err, checkpoint.ErrNotFound) {
		t.Errorf("absent: %v", err)
	}
	boot, err := checkpoint.BootID()
	if err != nil {
		t.Fatal(err)
	}
	h := checkpoint.Host{Arch: "amd64", CRIUVersion: "4.2.1", BootID: boot, CPUFlags: []string{"sse2"}, CgroupMode: "unified"}
	if err := WriteHostFacts(path, h); err != nil {
		t.Fatal(err)
	}
	if st, _ := os.Stat(path); st.Mode() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	if got, err := ReadHostFacts(path); err != nil || !reflect.DeepEqual(got, h) {
		t.Errorf("got %+v, %v", got, err)
	}
	h.BootID = "other"
	if err := WriteHostFacts(path, h); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadHostFacts(path); !errors.Is(err, checkpoint.ErrIncompatible) {
		t.Errorf("of another boot: %v", err)
	}
	write(t, path, []byte("{"))
	if _, err := ReadHostFacts(path); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("damaged: %v", err)
	}
}

func TestVersionWithoutCRIU(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if _, _, err := Version(context.Background()); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("error %v", err)
	}
	// A CRIU that never answers.
	write(t, filepath.Join(os.Getenv("PATH"), "criu"), []byte("#!/bin/sh\nexec /bin/sleep 100\n"))
	os.Chmod(filepath.Join(os.Getenv("PATH"), "criu"), 0o700)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := Features(ctx); err == nil || time.Since(start) > 5*time.Second {
		t.Errorf("error %v after %v", err, time.Since(start))
	}
}

// FuzzPagemap looks for runs that break what the reader promises.
func FuzzPagemap(f *testing.F) {
	b, err := os.ReadFile(sample + "/pagemap-1.img")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(encode(f, magicPagemap, &pagemap.PagemapHead{PagesId: proto.Uint32(1)}, &pagemap.PagemapEntry{Vaddr: proto.Uint64(4096), NrPages: proto.Uint32(7)}))
	f.Fuzz(func(t *testing.T, b []byte) {
		img, err := newImage(&images{}, "pagemap", bytes.NewReader(b), int64(len(b)), magicCommon, magicPagemap)
		if err != nil {
			return
		}
		end := uint64(0)
		_, err = img.pagemap(func(r run) error {
			if r.addr < end || r.pages == 0 || r.addr+r.pages*PageSize <= r.addr || r.addr+r.pages*PageSize > maxAddress {
				t.Fatalf("run %+v after %#x", r, end)
			}
			end = r.addr + r.pages*PageSize
			return nil
		})
		if err != nil && !errors.Is(err, checkpoint.ErrCorrupt) {
			t.Fatalf("error %v, want corrupt", err)
		}
	})
}

// FuzzImage puts the bytes in place of each kind of image in turn: reading may
// fail, but not crash, and never with anything but corrupt.
func FuzzImage(f *testing.F) {
	names := []string{"pstree.img", "core-1.img", "ids-1.img", "mm-1.img", "files.img", "fdinfo-2.img", "inventory.img", "mountpoints-13.img", "seccomp.img", "utsns-12.img", "remap-fpath.img", "stats-dump"}
	for i, n := range names {
		b, err := os.ReadFile(filepath.Join(sample, n))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(i), b)
	}
	dir := f.TempDir()
	if err := os.CopyFS(dir, os.DirFS(sample)); err != nil {
		f.Fatal(err)
	}
	spec, err := os.ReadFile("testdata/criu42-spec.json")
	if err != nil {
		f.Fatal(err)
	}
	s := new(specs.Spec)
	if err := json.Unmarshal(spec, s); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, i uint8, b []byte) {
		name := filepath.Join(dir, names[int(i)%len(names)])
		was, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		defer os.WriteFile(name, was, 0o600)
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		ok := func(err error) bool {
			return err == nil || errors.Is(err, checkpoint.ErrCorrupt) || errors.Is(err, checkpoint.ErrIncompatible) || absent(err)
		}
		if _, err := Inspect(dir); !ok(err) {
			t.Errorf("inspect: %v", err)
		}
		if err := CheckAgainstSpec(dir, s); !ok(err) {
			t.Errorf("check: %v", err)
		}
		if _, err := ReadDumpStats(dir); !ok(err) {
			t.Errorf("statistics: %v", err)
		}
	})
}
