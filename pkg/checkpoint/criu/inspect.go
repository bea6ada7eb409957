package criu

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"path/filepath"
	"sort"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/regfile"
	remap "github.com/checkpoint-restore/go-criu/v7/crit/images/remap-file-path"
	inet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	unixsk "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-unix"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/utsns"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"golang.org/x/sys/unix"
)

// maxReportItems bounds the mappings and, separately, the descriptors of all
// processes together.
const maxReportItems = 1 << 20

// Report says what is in an image directory. All text in it is printable.
type Report struct {
	Inventory Inventory `json:"inventory"`
	Hostname  string    `json:"hostname,omitempty"` // in the UTS namespace, if that is in the images
	// Processes are in the tree's order: a parent comes before its children,
	// the root first.
	Processes []Process `json:"processes"`
	Sockets   []Socket  `json:"sockets,omitempty"`
	// SysVIPC names the kinds of System V objects in the images: "shm", "msg",
	// "sem". A restore creates them in the namespace that the container joins
	// and fails where one of them exists already (CRIU criu/ipc_ns.c).
	SysVIPC []string `json:"sysvIPC,omitempty"`
	// MemoryBytes is the size of all pages in the images.
	MemoryBytes int64 `json:"memoryBytes"`
}

// Process is one dumped process.
type Process struct {
	PID     uint32   `json:"pid"` // in the container's namespace
	PPID    uint32   `json:"ppid"`
	PGID    uint32   `json:"pgid"`
	SID     uint32   `json:"sid"`
	Comm    string   `json:"comm"`
	State   string   `json:"state"` // "alive", "stopped", "zombie"
	Exe     string   `json:"exe,omitempty"`
	Threads []uint32 `json:"threads,omitempty"`
	UID     uint32   `json:"uid"` // effective
	GID     uint32   `json:"gid"` // effective

	Mappings []Mapping  `json:"mappings,omitempty"`
	Files    []OpenFile `json:"files,omitempty"`
	// ResidentBytes is what the images hold of the private memory.
	ResidentBytes uint64 `json:"residentBytes"`
}

// Mapping is one range of a process's address space.
type Mapping struct {
	Start     uint64 `json:"start"`
	End       uint64 `json:"end"`
	Prot      string `json:"prot"` // as in /proc/PID/maps: "r-xp"
	Kind      string `json:"kind"` // "anon", "heap", "stack", "file", "shmem", "sysv", "memfd", "vdso", "vvar", "vsyscall", "aio", "socket", "guard", "other"
	Path      string `json:"path,omitempty"`
	SizeBytes uint64 `json:"sizeBytes"`
	// ResidentBytes have their content in the images of this process, LazyBytes
	// of them can be filled in after a restore. The content of shared memory is
	// kept apart and not counted here.
	ResidentBytes uint64 `json:"residentBytes"`
	LazyBytes     uint64 `json:"lazyBytes"`
}

// OpenFile is one descriptor of a process.
type OpenFile struct {
	FD       uint32 `json:"fd"`
	Type     string `json:"type"` // "reg", "pipe", "fifo", "inetsk", "unixsk", "eventpoll", ...
	Path     string `json:"path,omitempty"`
	Flags    uint32 `json:"flags"` // open(2)
	Offset   uint64 `json:"offset"`
	Unlinked bool   `json:"unlinked,omitempty"` // the name is gone; content or a link is kept
}

// Socket is one socket of the container.
type Socket struct {
	Protocol string `json:"protocol"` // "tcp", "udp", "unix", ...
	Type     string `json:"type"`     // "stream", "dgram", "seqpacket", "raw"
	State    string `json:"state"`    // "listen", "established", "close", ...
	Local    string `json:"local,omitempty"`
	Remote   string `json:"remote,omitempty"`
}

// Inspect reads an image directory. It is not for restoring: only what a human
// wants to see is checked. Errors about the content wrap
// [checkpoint.ErrCorrupt].
func Inspect(imageDir string) (*Report, error) {
	d, err := openImages(imageDir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	r := new(Report)
	if r.Inventory, err = d.inventory(); err != nil {
		return nil, err
	}
	files, err := d.files()
	if err != nil {
		return nil, err
	}
	for _, id := range files.order {
		if s := files.byID[id].socket; s != nil {
			r.Sockets = append(r.Sockets, *s)
		}
	}
	tasks, err := d.tasks()
	if err != nil {
		return nil, err
	}
	mappings, descriptors := 0, 0
	for _, t := range tasks {
		p, err := d.process(t, files)
		if err != nil {
			return nil, err
		}
		mappings, descriptors = mappings+len(p.Mappings), descriptors+len(p.Files)
		if mappings > maxReportItems || descriptors > maxReportItems {
			return nil, d.corrupt(".", "more than %d mappings or descriptors", maxReportItems)
		}
		r.Processes = append(r.Processes, p)
	}
	if names, err := d.names("utsns-*.img"); err != nil {
		return nil, err
	} else if len(names) > 0 {
		sort.Strings(names)
		var e utsns.UtsnsEntry
		if err := d.one(&e, names[0], magicCommon, magicUTS); err != nil {
			return nil, err
		}
		r.Hostname = printable([]byte(e.GetNodename()))
	}
	for _, kind := range []string{"shm", "msg", "sem"} {
		names, err := d.names("ipcns-" + kind + "-*.img")
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			if size, err := d.size(n); err != nil {
				return nil, err
			} else if size > 8 { // more than the head
				r.SysVIPC = append(r.SysVIPC, kind)
				break
			}
		}
	}
	r.MemoryBytes, err = d.memory()
	return r, err
}

// MemoryBytes is the size of all pages in an image directory.
func MemoryBytes(imageDir string) (int64, error) {
	d, err := openImages(imageDir)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	return d.memory()
}

func (d *images) memory() (int64, error) {
	names, err := d.names("pages-*.img")
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, n := range names {
		size, err := d.size(n)
		if err != nil {
			return 0, err
		}
		sum += size
	}
	return sum, nil
}

// size is the size of a regular file of any size.
func (d *images) size(name string) (int64, error) {
	f, size, err := openRegular(d.fd, name, -1)
	if err != nil {
		return 0, fmt.Errorf("image: %w", err)
	}
	return size, f.Close()
}

func (d *images) process(t *task, files *fileTable) (Process, error) {
	tc := t.core.GetTc()
	p := Process{PID: t.pid, PPID: t.ppid, PGID: t.pgid, SID: t.sid, Threads: t.threads, Comm: printable([]byte(tc.GetComm()))}
	switch s := tc.GetTaskState(); s {
	case taskAlive:
		p.State = "alive"
	case taskStopped:
		p.State = "stopped"
	case taskZombie:
		p.State = "zombie"
		return p, nil
	default:
		return p, d.corrupt(coreName(t.pid), "task state %d", s)
	}
	creds := t.core.GetThreadCore().GetCreds()
	p.UID, p.GID = creds.GetEuid(), creds.GetEgid()
	if err := d.mappings(&p, files); err != nil {
		return p, err
	}
	name := fmt.Sprintf("fdinfo-%d.img", t.ids.GetFilesId())
	err := each(d, name, magicFdinfo, new(fdinfo.FdinfoEntry), func(e *fdinfo.FdinfoEntry) error {
		if len(p.Files) >= maxReportItems {
			return d.corrupt(name, "more than %d descriptors", maxReportItems)
		}
		f := OpenFile{FD: e.GetFd(), Type: typeName(e.GetType())}
		if info, ok := files.byID[e.GetId()]; ok {
			f.Path, f.Flags, f.Offset, f.Unlinked = info.path, info.flags, info.offset, info.unlinked
		}
		p.Files = append(p.Files, f)
		return nil
	})
	if absent(err) { // no descriptors
		err = nil
	}
	return p, err
}

// mappings fills in what mm-PID.img and pagemap-PID.img say.
func (d *images) mappings(p *Process, files *fileTable) error {
	name := mmName(p.PID)
	var e mm.MmEntry
	if err := d.one(&e, name, magicCommon, magicMM); err != nil {
		return err
	}
	if len(e.GetVmas()) > maxMappings {
		return d.corrupt(name, "%d mappings", len(e.GetVmas()))
	}
	if f, ok := files.byID[e.GetExeFileId()]; ok {
		p.Exe = f.path
	}
	end := uint64(0)
	var guards []Mapping // ranges within others that no page may ever fill; CRIU puts them at the end
	for _, v := range e.GetVmas() {
		guard := v.GetStatus()&vmaGuard != 0
		// The vsyscall page lies above user space.
		kernel := v.GetStatus()&vmaVsyscall != 0
		if v.GetStart() >= v.GetEnd() || v.GetStart() < end && !guard || v.GetEnd() > maxAddress && !kernel {
			return d.corrupt(name, "mapping %#x-%#x", v.GetStart(), v.GetEnd())
		}
		if !guard {
			end = v.GetEnd()
		}
		m := Mapping{
			Start: v.GetStart(), End: v.GetEnd(), SizeBytes: v.GetEnd() - v.GetStart(),
			Prot: protName(v), Kind: mappingKind(v.GetStatus()),
		}
		if m.Kind == "anon" && v.GetStart() <= e.GetMmStartStack() && e.GetMmStartStack() < v.GetEnd() {
			m.Kind = "stack"
		}
		if v.GetStatus()&(vmaFilePrivate|vmaFileShared) != 0 {
			if f, ok := files.byID[uint32(v.GetShmid())]; ok && v.GetShmid() <= 1<<32-1 {
				m.Path = f.path
			}
		}
		if guard {
			guards = append(guards, m)
			continue
		}
		p.Mappings = append(p.Mappings, m)
	}
	i := 0
	_, err := d.pagemap(pagemapName(p.PID), func(r run) error {
		if r.flags&(pagePresent|pageParent) == 0 {
			return nil
		}
		p.ResidentBytes += r.pages * PageSize
		// Runs and mappings are both sorted; a run may touch several mappings.
		start, end := r.addr, r.addr+r.pages*PageSize
		for i < len(p.Mappings) && p.Mappings[i].End <= start {
			i++
		}
		for j := i; j < len(p.Mappings) && p.Mappings[j].Start < end; j++ {
			m := &p.Mappings[j]
			n := min(m.End, end) - max(m.Start, start)
			m.ResidentBytes += n
			if r.flags&pageLazy != 0 {
				m.LazyBytes += n
			}
		}
		return nil
	})
	if absent(err) {
		err = nil
	}
	p.Mappings = append(p.Mappings, guards...)
	return err
}

// Status bits of a mapping, CRIU criu/include/image.h.
const (
	vmaStack       = 1 << 1
	vmaVsyscall    = 1 << 2
	vmaVdso        = 1 << 3
	vmaHeap        = 1 << 5
	vmaFilePrivate = 1 << 6
	vmaFileShared  = 1 << 7
	vmaAnonShared  = 1 << 8
	vmaAnonPrivate = 1 << 9
	vmaSysV        = 1 << 10
	vmaSocket      = 1 << 11
	vmaVvar        = 1 << 12
	vmaAIO         = 1 << 13
	vmaMemfd       = 1 << 14
	vmaGuard       = 1 << 16
)

func mappingKind(status uint32) string {
	for _, k := range []struct {
		bit  uint32
		name string
	}{
		{vmaVsyscall, "vsyscall"}, {vmaVdso, "vdso"}, {vmaVvar, "vvar"}, {vmaGuard, "guard"},
		{vmaAIO, "aio"}, {vmaSocket, "socket"}, {vmaSysV, "sysv"}, {vmaMemfd, "memfd"},
		{vmaStack, "stack"}, {vmaHeap, "heap"}, {vmaFilePrivate | vmaFileShared, "file"},
		{vmaAnonShared, "shmem"}, {vmaAnonPrivate, "anon"},
	} {
		if status&k.bit != 0 {
			return k.name
		}
	}
	return "other"
}

func protName(v *vma.VmaEntry) string {
	b := []byte("---p")
	for i, bit := range []uint32{unix.PROT_READ, unix.PROT_WRITE, unix.PROT_EXEC} {
		if v.GetProt()&bit != 0 {
			b[i] = "rwx"[i]
		}
	}
	if v.GetFlags()&unix.MAP_SHARED != 0 {
		b[3] = 's'
	}
	return string(b)
}

// fileInfo is what is known of an open file description.
type fileInfo struct {
	path     string
	flags    uint32
	offset   uint64
	unlinked bool
	socket   *Socket
}

type fileTable struct {
	byID  map[uint32]*fileInfo
	order []uint32 // ids as they came
}

// files reads files.img and the names that it remaps.
func (d *images) files() (*fileTable, error) {
	const name = "files.img"
	t := &fileTable{byID: map[uint32]*fileInfo{}}
	err := each(d, name, magicFiles, new(fdinfo.FileEntry), func(e *fdinfo.FileEntry) error {
		if len(t.order) >= maxReportItems {
			return d.corrupt(name, "more than %d files", maxReportItems)
		}
		if t.byID[e.GetId()] != nil {
			return d.corrupt(name, "file id %d twice", e.GetId())
		}
		t.byID[e.GetId()] = describe(e)
		t.order = append(t.order, e.GetId())
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = each(d, "remap-fpath.img", magicRemap, new(remap.RemapFilePathEntry), func(e *remap.RemapFilePathEntry) error {
		if f := t.byID[e.GetOrigId()]; f != nil && e.GetRemapType() != remap.RemapType_PROCFS {
			f.unlinked = true
		}
		return nil
	})
	if absent(err) {
		err = nil
	}
	return t, err
}

func describe(e *fdinfo.FileEntry) *fileInfo {
	f := &fileInfo{path: typeName(e.GetType())}
	switch {
	case e.Reg != nil:
		*f = regInfo(e.Reg)
	case e.Isk != nil:
		f.flags = e.Isk.GetFlags()
		f.socket = inetSocket(e.Isk)
		f.path = f.socket.String()
	case e.Usk != nil:
		f.flags = e.Usk.GetFlags()
		f.socket = unixSocket(e.Usk)
		f.path = f.socket.String()
	case e.Pipe != nil:
		f.flags = e.Pipe.GetFlags()
		f.path = fmt.Sprintf("pipe:[%d]", e.Pipe.GetPipeId())
	case e.Fifo != nil:
		f.path = fmt.Sprintf("fifo:[%d]", e.Fifo.GetPipeId())
	case e.Tty != nil:
		f.flags = e.Tty.GetFlags()
	case e.Memfd != nil:
		f.flags, f.offset = e.Memfd.GetFlags(), e.Memfd.GetPos()
	}
	return f
}

func regInfo(r *regfile.RegFileEntry) fileInfo {
	return fileInfo{path: printable([]byte(r.GetName())), flags: r.GetFlags(), offset: r.GetPos()}
}

// typeName is the lower-case name of a type of file. go-criu v7.2.0 does not
// know pidfds, which CRIU dumps since 4.1.
func typeName(t fdinfo.FdTypes) string {
	const pidfd = 20
	if name, ok := fdinfo.FdTypes_name[int32(t)]; ok {
		return strings.ToLower(name)
	}
	if t == pidfd {
		return "pidfd"
	}
	return fmt.Sprintf("type-%d", t)
}

// String is "tcp 127.0.0.1:80 listen" or "tcp A -> B established".
func (s *Socket) String() string {
	out := s.Protocol
	if s.Local != "" {
		out += " " + s.Local
	}
	if s.Remote != "" {
		out += " -> " + s.Remote
	}
	return out + " " + s.State
}

// tcpStates are the kernel's, include/net/tcp_states.h.
var tcpStates = [...]string{
	1: "established", 2: "syn-sent", 3: "syn-received", 4: "fin-wait-1", 5: "fin-wait-2", 6: "time-wait",
	7: "close", 8: "close-wait", 9: "last-ack", 10: "listen", 11: "closing",
}

func stateName(state uint32) string {
	if state < uint32(len(tcpStates)) && tcpStates[state] != "" {
		return tcpStates[state]
	}
	return fmt.Sprintf("state-%d", state)
}

func socketType(t uint32) string {
	switch t {
	case unix.SOCK_STREAM:
		return "stream"
	case unix.SOCK_DGRAM:
		return "dgram"
	case unix.SOCK_SEQPACKET:
		return "seqpacket"
	case unix.SOCK_RAW:
		return "raw"
	}
	return fmt.Sprintf("type-%d", t)
}

func inetSocket(e *inet.InetSkEntry) *Socket {
	s := &Socket{Type: socketType(e.GetType()), State: stateName(e.GetState())}
	switch e.GetProto() {
	case unix.IPPROTO_TCP:
		s.Protocol = "tcp"
	case unix.IPPROTO_UDP:
		s.Protocol = "udp"
	case unix.IPPROTO_UDPLITE:
		s.Protocol = "udplite"
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		s.Protocol = "icmp"
	default:
		s.Protocol = fmt.Sprintf("ip-%d", e.GetProto())
	}
	s.Local = endpoint(e.GetSrcAddr(), e.GetSrcPort())
	if e.GetDstPort() != 0 {
		s.Remote = endpoint(e.GetDstAddr(), e.GetDstPort())
	}
	return s
}

// endpoint prints an address, which images hold in network byte order in
// words of the machine's, and a port.
func endpoint(words []uint32, port uint32) string {
	if len(words) != 1 && len(words) != 4 {
		return "invalid"
	}
	var b []byte
	for _, w := range words {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a, uint16(port)).String()
}

func unixSocket(e *unixsk.UnixSkEntry) *Socket {
	s := &Socket{Protocol: "unix", Type: socketType(e.GetType()), State: stateName(e.GetState())}
	name := e.GetName()
	if len(name) > 0 && name[0] == 0 { // abstract
		name = append([]byte("@"), name[1:]...)
	} else {
		name = []byte(strings.TrimRight(string(name), "\x00"))
		if dir := e.GetNameDir(); dir != "" && len(name) > 0 && !filepath.IsAbs(string(name)) {
			name = []byte(filepath.Join(dir, string(name)))
		}
	}
	s.Local = printable(name)
	if e.GetPeer() != 0 {
		s.Remote = fmt.Sprintf("inode %d", e.GetPeer())
	}
	return s
}
