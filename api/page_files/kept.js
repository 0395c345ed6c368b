// The images that requests of this browser were made of, so that one can be made again: the server does not give them back.

const MOST = 40;
const VERSION = 2;
const STORE = "requests"; // with the time at which each was kept, which their ids do not tell

function opened() {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open("triptych", VERSION);
    opening.onupgradeneeded = () => {
      for (const name of opening.result.objectStoreNames) opening.result.deleteObjectStore(name);
      opening.result.createObjectStore(STORE).createIndex("at", "at");
    };
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
}

async function within(mode, work) {
  const database = await opened();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(STORE, mode);
    const asked = work(transaction.objectStore(STORE));
    transaction.oncomplete = () => (database.close(), resolve(asked?.result));
    transaction.onabort = () => (database.close(), reject(transaction.error));
  });
}

/** Keep the files of a request, and forget those that have been kept for longest. */
export async function keepFiles(id, entries) {
  try {
    const ids = await within("readonly", (store) => store.index("at").getAllKeys());
    await within("readwrite", (store) => {
      for (const old of ids.slice(0, Math.max(0, ids.length - MOST + 1))) store.delete(old);
      store.put({ at: Date.now(), entries }, id);
    });
  } catch (error) {
    console.warn("the images are not kept for later", error); // a private window, or a full disk: the request goes on
  }
}

/** Return names and files of a request, [] where they are not kept. */
export async function filesOf(id) {
  try {
    return (await within("readonly", (store) => store.get(id)))?.entries ?? [];
  } catch (error) {
    console.warn("kept images cannot be read", error); // as above
    return [];
  }
}

/** Forget the files of a request. */
export async function forgetFiles(id) {
  await within("readwrite", (store) => store.delete(id)).catch(() => {}); // there were none to keep
}
