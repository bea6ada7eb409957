package criu

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// TestSetMergeable: private anonymous memory is offered, and nothing else.
func TestSetMergeable(t *testing.T) {
	const (
		mergeable = 1 << unix.MADV_MERGEABLE
		anon      = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
		rw        = unix.PROT_READ | unix.PROT_WRITE
		regular   = 1
	)
	mappings := []struct {
		name                string
		prot, flags, status uint32
		madv                uint64
		offered             bool
	}{
		{"memory", rw, anon, regular | vmaAnonPrivate, 0, true},
		{"heap", rw, anon | unix.MAP_NORESERVE, regular | vmaHeap | vmaAnonPrivate, 0, true},
		{"read-only", unix.PROT_READ, anon, regular | vmaAnonPrivate, 0, true},
		{"other advice", rw, anon, regular | vmaAnonPrivate, 1<<unix.MADV_DONTFORK | 1<<unix.MADV_HUGEPAGE, true},
		{"offered already", rw, anon, regular | vmaAnonPrivate, mergeable, true},
		{"stack", rw, anon, regular | vmaStack | vmaAnonPrivate, 0, false},
		{"stack, offered", rw, anon | unix.MAP_GROWSDOWN, regular | vmaAnonPrivate, mergeable, false},
		{"reserved", unix.PROT_NONE, anon, regular | vmaAnonPrivate, 0, false},
		{"locked", rw, anon | unix.MAP_LOCKED, regular | vmaAnonPrivate, 0, false},
		{"secret", rw, anon, regular | vmaAnonPrivate, 1 << unix.MADV_DONTDUMP, false},
		{"droppable", rw, anon | mapDroppable, regular | vmaAnonPrivate, 0, false},
		{"huge pages", rw, anon | unix.MAP_HUGETLB, regular | vmaAnonPrivate, 0, false},
		{"shared", rw, unix.MAP_SHARED | unix.MAP_ANONYMOUS, regular | vmaAnonShared, 0, false},
		{"file", rw, unix.MAP_PRIVATE, regular | vmaFilePrivate, 0, false},
		{"vdso", unix.PROT_READ, anon, regular | vmaVdso | vmaAnonPrivate, 0, false},
		{"guard", rw, anon, vmaGuard, 0, false},
	}
	image := func(madv func(i int) uint64) []byte {
		e := &mm.MmEntry{MmStartCode: proto.Uint64(7)}
		e.ProtoReflect().SetUnknown([]byte{0xf8, 0x3f, 1}) // a field of a newer CRIU
		for i, m := range mappings {
			start := uint64(i+1) << 20
			v := &vma.VmaEntry{Start: proto.Uint64(start), End: proto.Uint64(start + PageSize), Prot: proto.Uint32(m.prot),
				Flags: proto.Uint32(m.flags), Status: proto.Uint32(m.status)}
			if bits := madv(i); bits != 0 || m.madv != 0 {
				v.Madv = proto.Uint64(bits)
			}
			e.Vmas = append(e.Vmas, v)
		}
		return encode(t, magicMM, e)
	}
	dumped := image(func(i int) uint64 { return mappings[i].madv })
	on := image(func(i int) uint64 {
		bits := mappings[i].madv &^ mergeable
		if mappings[i].offered {
			bits |= mergeable
		}
		return bits
	})
	off := image(func(i int) uint64 { return mappings[i].madv &^ mergeable })

	images := copyImages(t)
	write(t, images+"/mm-99.img", dumped)
	for _, tc := range []struct {
		on   bool
		want []byte
	}{{true, on}, {false, off}} {
		dir := viewOf(t, images)
		if err := SetMergeable(images, dir, tc.on); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(dir + "/mm-99.img")
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, tc.want) {
			var e, want mm.MmEntry
			if err := errors.Join(proto.Unmarshal(got[12:], &e), proto.Unmarshal(tc.want[12:], &want)); err != nil {
				t.Fatal(err)
			}
			for i, m := range mappings {
				if g, w := e.Vmas[i].GetMadv(), want.Vmas[i].GetMadv(); g != w {
					t.Errorf("on: %v, %s: advice %#x, want %#x", tc.on, m.name, g, w)
				}
			}
			t.Errorf("on: %v: the image differs", tc.on)
		}
		if st, err := os.Lstat(dir + "/mm-99.img"); err != nil || st.Mode() != 0o600 {
			t.Errorf("mode %v, %v", st.Mode(), err)
		}
		if got, _ := os.ReadFile(images + "/mm-99.img"); !bytes.Equal(got, dumped) {
			t.Error("the original was changed")
		}
	}

	// The other images, of a real dump: offered as a whole, and left alone.
	names, err := filepath.Glob(images + "/mm-*.img")
	if err != nil || len(names) < 2 {
		t.Fatalf("%v, %v", names, err)
	}
	dirOn, dirOff := viewOf(t, images), viewOf(t, images)
	if err := errors.Join(SetMergeable(images, dirOn, true), SetMergeable(images, dirOff, false)); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		name = filepath.Base(name)
		if name == "mm-99.img" {
			continue
		}
		if _, err := os.Readlink(filepath.Join(dirOff, name)); err != nil {
			t.Errorf("with nothing to do, the link is replaced: %v", err)
		}
		if _, err := os.Readlink(filepath.Join(dirOn, name)); err == nil {
			t.Errorf("%s: nothing is offered", name)
		}
	}

	write(t, images+"/mm-99.img", dumped[:len(dumped)-1])
	if err := SetMergeable(images, viewOf(t, images), true); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("damaged image: %v", err)
	}
	if err := os.Remove(images + "/mm-99.img"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("mm-1.img", images+"/mm-99.img"); err != nil {
		t.Fatal(err)
	}
	if err := SetMergeable(images, dirOn, true); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("link: %v", err)
	}
}
