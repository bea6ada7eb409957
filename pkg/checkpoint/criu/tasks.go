package criu

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
)

const magicIDs = 0x54432030

// States of a task, CRIU compel/include/uapi/task-state.h.
const (
	taskAlive   = 1
	taskZombie  = 2
	taskStopped = 3
)

// task is a process of pstree.img. Threads holds the ids of its threads, its
// own first; a zombie has none (CRIU leaves an uninitialised id in the image).
type task struct {
	pid, ppid, pgid, sid uint32
	threads              []uint32
	core                 *core.CoreEntry // of the first thread
	ids                  *core.TaskKobjIdsEntry
}

func (t *task) zombie() bool { return t.core.GetTc().GetTaskState() == taskZombie }

func (t *task) String() string {
	return fmt.Sprintf("process %d (%s)", t.pid, printable([]byte(t.core.GetTc().GetComm())))
}

// tasks reads the process tree, parents before their children, with the core
// image and object ids of each process.
func (d *images) tasks() ([]*task, error) {
	const name = "pstree.img"
	var ts []*task
	seen := map[uint32]bool{0: true}
	threads := 0
	err := each(d, name, magicPstree, new(pstree.PstreeEntry), func(e *pstree.PstreeEntry) error {
		pid := e.GetPid()
		if pid == 0 || seen[pid] {
			return d.corrupt(name, "process id %d twice or 0", pid)
		}
		if !seen[e.GetPpid()] || e.GetPpid() == 0 && len(ts) > 0 {
			return d.corrupt(name, "process %d: no parent %d before it", pid, e.GetPpid())
		}
		seen[pid] = true
		if threads += len(e.GetThreads()); threads > maxTasks || len(ts) >= maxTasks {
			return d.corrupt(name, "more than %d processes or threads", maxTasks)
		}
		ts = append(ts, &task{
			pid: pid, ppid: e.GetPpid(), pgid: e.GetPgid(), sid: e.GetSid(),
			threads: append([]uint32(nil), e.GetThreads()...),
		})
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(ts) == 0 {
		return nil, d.corrupt(name, "no processes")
	}
	for _, t := range ts {
		if t.core, err = d.core(t.pid); err != nil {
			return nil, err
		}
		if t.core.GetTc() == nil {
			return nil, d.corrupt(coreName(t.pid), "no process in it")
		}
		if t.zombie() {
			t.threads = nil
			continue
		}
		if len(t.threads) == 0 || t.threads[0] != t.pid {
			return nil, d.corrupt(name, "process %d: threads %v do not begin with it", t.pid, t.threads)
		}
		t.ids = new(core.TaskKobjIdsEntry)
		if err := d.one(t.ids, fmt.Sprintf("ids-%d.img", t.pid), magicCommon, magicIDs); err != nil {
			return nil, err
		}
	}
	return ts, nil
}

func coreName(tid uint32) string { return fmt.Sprintf("core-%d.img", tid) }

func (d *images) core(tid uint32) (*core.CoreEntry, error) {
	c := new(core.CoreEntry)
	return c, d.one(c, coreName(tid), magicCommon, magicCore)
}

// run is a run of pages in a pagemap.
type run struct {
	addr  uint64 // of the first page
	pages uint64
	flags uint32
}

// Flags of a run, CRIU criu/include/pagemap.h.
const (
	pageParent  = 1 << 0 // the data is in the parent's images
	pageLazy    = 1 << 1 // may be filled in later
	pagePresent = 1 << 2 // the data is in pages-ID.img
)

// maxAddress bounds addresses of user space: 57 bits with five-level page
// tables, less on other architectures.
const maxAddress = 1 << 57

// pagemap calls f with each run of a process's pagemap, in the order of their
// addresses, and returns the id of the file with the pages. A process without a
// pagemap has no memory of its own: fs.ErrNotExist.
func (d *images) pagemap(name string, f func(run) error) (pagesID uint32, err error) {
	img, err := d.open(name, magicCommon, magicPagemap)
	if err != nil {
		return 0, err
	}
	defer img.Close()
	return img.pagemap(f)
}

func (i *image) pagemap(f func(run) error) (uint32, error) {
	var head pagemap.PagemapHead
	if err := i.next(&head); err != nil {
		if errors.Is(err, io.EOF) {
			return 0, i.bad("no head")
		}
		return 0, err
	}
	if head.PagesId == nil {
		return 0, i.bad("head without pages id")
	}
	var e pagemap.PagemapEntry
	for end := uint64(0); ; {
		e.Reset()
		if err := i.next(&e); err != nil {
			if errors.Is(err, io.EOF) {
				return head.GetPagesId(), nil
			}
			return 0, err
		}
		r := run{addr: e.GetVaddr(), pages: uint64(e.GetNrPages()), flags: e.GetFlags()}
		// CRIU 4.2 writes the number into field 5 and 0 into field 2, which
		// is all that go-criu v7.2.0 knows; CRIU before it writes field 2 only.
		if n, ok := unknownUint(&e, 5); ok {
			r.pages = n
		}
		if e.Flags == nil { // CRIU before 3.0
			r.flags = pagePresent
			if e.GetInParent() {
				r.flags = pageParent
			}
		}
		if r.addr%PageSize != 0 || r.pages == 0 || r.addr < end ||
			r.addr >= maxAddress || r.pages > (maxAddress-r.addr)/PageSize {
			return 0, i.bad("run of %d pages at %#x", r.pages, r.addr)
		}
		end = r.addr + r.pages*PageSize
		if err := f(r); err != nil {
			return 0, err
		}
	}
}

// absent tells whether the error says that an image file is not there.
func absent(err error) bool { return errors.Is(err, fs.ErrNotExist) }
